//! Two things to draw on: SVG text and pixels. Coordinates are in pixels of an image without magnification.

use std::fmt::Write as _;

use tiny_skia::{Color, FillRule, Paint, PathBuilder, Pixmap, Rect, Stroke, StrokeDash, Transform};
use ttf_parser::{Face, OutlineBuilder};

use crate::sweep::escaped;

/// Where a text is put relative to its point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Anchor {
    Start,
    Middle,
    End,
}

/// What a thing is drawn in; what it looks like depends on the light.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ink {
    /// Words.
    Text,
    /// Ticks and what matters less.
    Faint,
    /// Lines of the grid.
    Grid,
    /// A run, by its number.
    Series(usize),
}

/// Colours that the colour-blind can tell apart, on light (after Okabe and Ito, 2008; without their yellow, which
/// vanishes on white).
pub(crate) const SERIES: [[u8; 3]; 6] = [
    [0, 114, 178],
    [213, 94, 0],
    [0, 158, 115],
    [204, 121, 167],
    [86, 180, 233],
    [230, 159, 0],
];

/// The same on dark: brighter, and the light blue and the orange so light that they are told from the blue and the red.
pub(crate) const DARK: [[u8; 3]; 6] = [
    [47, 134, 210],
    [232, 103, 12],
    [16, 176, 131],
    [217, 139, 184],
    [159, 220, 255],
    [245, 200, 76],
];

/// How the lines of a run beyond the colours are broken: on, off.
pub(crate) fn dash(series: usize) -> Option<[f32; 2]> {
    match series / SERIES.len() {
        0 => None,
        1 => Some([7.0, 4.0]),
        _ => Some([2.0, 3.0]),
    }
}

/// What can be drawn on.
pub(crate) trait Canvas {
    fn line(&mut self, points: &[(f32, f32)], ink: Ink, width: f32);
    fn rect(&mut self, x: f32, y: f32, width: f32, height: f32, ink: Ink);
    fn text(&mut self, x: f32, y: f32, size: f32, anchor: Anchor, ink: Ink, text: &str);
}

/// The text of an SVG image; its colours are those of the page's style sheet.
pub(crate) struct Svg {
    body: String,
    size: (f32, f32),
}

impl Svg {
    pub(crate) fn new(width: f32, height: f32) -> Self {
        Self {
            body: String::new(),
            size: (width, height),
        }
    }

    pub(crate) fn finish(self, title: &str) -> String {
        let (width, height) = self.size;
        let title = escaped(title);
        format!(
            "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{title}\"><title>{title}</title>{}</svg>",
            self.body
        )
    }

    fn class(ink: Ink) -> String {
        match ink {
            Ink::Text => "text".into(),
            Ink::Faint => "faint".into(),
            Ink::Grid => "grid".into(),
            Ink::Series(i) => format!("s{}", i % SERIES.len()),
        }
    }
}

impl Canvas for Svg {
    fn line(&mut self, points: &[(f32, f32)], ink: Ink, width: f32) {
        let mut path = String::new();
        for (i, (x, y)) in points.iter().enumerate() {
            let letter = if i == 0 { 'M' } else { 'L' };
            let _ = write!(path, "{letter}{x:.1} {y:.1}"); // to a string it always succeeds
        }
        let dashes = match ink {
            Ink::Series(i) => dash(i),
            _ => None,
        };
        let dashes = dashes.map_or(String::new(), |[on, off]| {
            format!(" stroke-dasharray=\"{on} {off}\"")
        });
        let class = Self::class(ink);
        let _ = write!(
            self.body,
            "<path class=\"{class}\" d=\"{path}\" fill=\"none\" stroke-width=\"{width}\"{dashes}/>"
        );
    }

    fn rect(&mut self, x: f32, y: f32, width: f32, height: f32, ink: Ink) {
        let class = Self::class(ink);
        let _ = write!(
            self.body,
            "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\"/>"
        );
    }

    fn text(&mut self, x: f32, y: f32, size: f32, anchor: Anchor, ink: Ink, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let (class, text) = (Self::class(ink), escaped(text));
        let _ = write!(
            self.body,
            "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" text-anchor=\"{anchor}\">{text}</text>"
        );
    }
}

/// DejaVu Sans, Latin only (`pyftsubset`); its licence is beside it.
const FONT: &[u8] = include_bytes!("DejaVuSans-latin.ttf");
/// Pixels of the image to one of the drawing.
const SCALE: f32 = 2.0;

/// An image on white.
pub(crate) struct Image {
    pixels: Pixmap,
    font: Face<'static>,
}

impl Image {
    pub(crate) fn new(width: f32, height: f32) -> Self {
        let mut pixels = Pixmap::new((width * SCALE) as u32, (height * SCALE) as u32)
            .expect("an image has a size");
        pixels.fill(Color::WHITE);
        Self {
            pixels,
            font: Face::parse(FONT, 0).expect("the font is whole"),
        }
    }

    pub(crate) fn png(&self) -> Vec<u8> {
        self.pixels.encode_png().expect("memory takes it")
    }

    fn paint(ink: Ink) -> Paint<'static> {
        let [r, g, b] = match ink {
            Ink::Text => [26, 29, 33],
            Ink::Faint => [90, 97, 105],
            Ink::Grid => [222, 226, 230],
            Ink::Series(i) => SERIES[i % SERIES.len()],
        };
        let mut paint = Paint::default();
        paint.set_color_rgba8(r, g, b, 255);
        paint.anti_alias = true;
        paint
    }

    /// Advance and glyph of each character, in the font's units.
    fn glyphs(&self, text: &str) -> Vec<(f32, Option<ttf_parser::GlyphId>)> {
        let of = |c: char| {
            let glyph = self
                .font
                .glyph_index(c)
                .or_else(|| self.font.glyph_index('?'));
            let advance = glyph.and_then(|glyph| self.font.glyph_hor_advance(glyph));
            (f32::from(advance.unwrap_or(0)), glyph)
        };
        text.chars().map(of).collect()
    }
}

/// How wide a text is in the font of the images; a browser's own is close to it.
pub(crate) fn text_width(text: &str, size: f32) -> f32 {
    let font = Face::parse(FONT, 0).expect("the font is whole");
    let advance = |c: char| {
        let glyph = font.glyph_index(c)?;
        font.glyph_hor_advance(glyph)
    };
    let units: f32 = text
        .chars()
        .map(|c| f32::from(advance(c).unwrap_or(1200)))
        .sum();
    units * size / f32::from(font.units_per_em())
}

struct Outline {
    path: PathBuilder,
    at: (f32, f32),
    scale: f32,
}

impl Outline {
    fn point(&self, x: f32, y: f32) -> (f32, f32) {
        // A font's y points up.
        (self.at.0 + x * self.scale, self.at.1 - y * self.scale)
    }
}

impl OutlineBuilder for Outline {
    fn move_to(&mut self, x: f32, y: f32) {
        let (x, y) = self.point(x, y);
        self.path.move_to(x, y);
    }

    fn line_to(&mut self, x: f32, y: f32) {
        let (x, y) = self.point(x, y);
        self.path.line_to(x, y);
    }

    fn quad_to(&mut self, x1: f32, y1: f32, x: f32, y: f32) {
        let ((x1, y1), (x, y)) = (self.point(x1, y1), self.point(x, y));
        self.path.quad_to(x1, y1, x, y);
    }

    fn curve_to(&mut self, x1: f32, y1: f32, x2: f32, y2: f32, x: f32, y: f32) {
        let ((x1, y1), (x2, y2)) = (self.point(x1, y1), self.point(x2, y2));
        let (x, y) = self.point(x, y);
        self.path.cubic_to(x1, y1, x2, y2, x, y);
    }

    fn close(&mut self) {
        self.path.close();
    }
}

impl Canvas for Image {
    fn line(&mut self, points: &[(f32, f32)], ink: Ink, width: f32) {
        let mut path = PathBuilder::new();
        for (i, &(x, y)) in points.iter().enumerate() {
            match i {
                0 => path.move_to(x, y),
                _ => path.line_to(x, y),
            }
        }
        let dashes = match ink {
            Ink::Series(i) => dash(i),
            _ => None,
        };
        let stroke = Stroke {
            width,
            dash: dashes.and_then(|d| StrokeDash::new(d.to_vec(), 0.0)),
            ..Stroke::default()
        };
        // A line of one point is none.
        if let Some(path) = path.finish() {
            let scale = Transform::from_scale(SCALE, SCALE);
            self.pixels
                .stroke_path(&path, &Self::paint(ink), &stroke, scale, None);
        }
    }

    fn rect(&mut self, x: f32, y: f32, width: f32, height: f32, ink: Ink) {
        if let Some(rect) = Rect::from_xywh(x, y, width, height) {
            let scale = Transform::from_scale(SCALE, SCALE);
            self.pixels.fill_rect(rect, &Self::paint(ink), scale, None);
        }
    }

    fn text(&mut self, x: f32, y: f32, size: f32, anchor: Anchor, ink: Ink, text: &str) {
        let glyphs = self.glyphs(text);
        let scale = size / f32::from(self.font.units_per_em());
        let width: f32 = glyphs.iter().map(|(advance, _)| advance * scale).sum();
        let mut x = match anchor {
            Anchor::Start => x,
            Anchor::Middle => x - width / 2.0,
            Anchor::End => x - width,
        };
        let mut outline = Outline {
            path: PathBuilder::new(),
            at: (x, y),
            scale,
        };
        for (advance, glyph) in glyphs {
            outline.at = (x, y);
            if let Some(glyph) = glyph {
                self.font.outline_glyph(glyph, &mut outline);
            }
            x += advance * scale;
        }
        if let Some(path) = outline.path.finish() {
            let scale = Transform::from_scale(SCALE, SCALE);
            let paint = Self::paint(ink);
            self.pixels
                .fill_path(&path, &paint, FillRule::Winding, scale, None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linear(rgb: [u8; 3]) -> [f64; 3] {
        rgb.map(|c| match f64::from(c) / 255.0 {
            c if c <= 0.04045 => c / 12.92,
            c => ((c + 0.055) / 1.055).powf(2.4),
        })
    }

    /// CIE L*a*b* of linear RGB, D65.
    fn lab([r, g, b]: [f64; 3]) -> [f64; 3] {
        let f = |t: f64| match t {
            t if t > 0.008_856 => t.cbrt(),
            t => 7.787 * t + 16.0 / 116.0,
        };
        let x = f((0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.950_47);
        let y = f(0.2126 * r + 0.7152 * g + 0.0722 * b);
        let z = f((0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.088_83);
        [116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)]
    }

    /// What the colour-blind see (Machado et al., 2009, severity 1): all, no red, no green, no blue.
    const EYES: [[[f64; 3]; 3]; 4] = [
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
        [
            [0.152_286, 1.052_583, -0.204_868],
            [0.114_503, 0.786_281, 0.099_216],
            [-0.003_882, -0.048_116, 1.051_998],
        ],
        [
            [0.367_322, 0.860_646, -0.227_968],
            [0.280_085, 0.672_501, 0.047_413],
            [-0.011_820, 0.042_940, 0.968_881],
        ],
        [
            [1.255_528, -0.076_749, -0.178_779],
            [-0.078_411, 0.930_809, 0.147_602],
            [0.004_733, 0.691_367, 0.303_900],
        ],
    ];

    #[test]
    fn the_colour_blind_tell_the_runs_apart() {
        for colours in [SERIES, DARK] {
            for eye in EYES {
                let seen = colours.map(|rgb| {
                    let rgb = linear(rgb);
                    let see = |row: [f64; 3]| row.iter().zip(rgb).map(|(m, c)| m * c).sum::<f64>();
                    lab(eye.map(|row| see(row).clamp(0.0, 1.0)))
                });
                for i in 0..seen.len() {
                    for j in 0..i {
                        let apart = seen[i].iter().zip(seen[j]).map(|(a, b)| (a - b).powi(2));
                        let apart = apart.sum::<f64>().sqrt();
                        // 2.3 is just seen side by side (Mahy et al., 1994); thin lines need more.
                        assert!(apart > 15.0, "{:?} {:?}: {apart}", colours[i], colours[j]);
                    }
                }
            }
        }
    }

    #[test]
    fn lines_stand_out_on_dark() {
        let luminance = |rgb| (lab(linear(rgb))[0] + 16.0) / 116.0;
        let back = luminance([30, 33, 38]).powi(3);
        for colour in DARK {
            let contrast = (luminance(colour).powi(3) + 0.05) / (back + 0.05);
            assert!(contrast > 3.0, "{colour:?}: {contrast}");
        }
    }
}

//! What comes before the scan, for files that are simple enough: one baseline scan of all components, or progressive ones;
//! 8 bits, grey or YCbCr, subsampling by two at most, no restart markers in the one scan. All else is the exact decoder's.

use super::super::{MAX_PIXELS, scan::ZIGZAG, short};

/// A component of the frame.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Component {
    id: u8,
    /// Sampling factors: blocks in a unit.
    pub(super) across: usize,
    pub(super) down: usize,
    /// Index of the quantisation table.
    pub(super) table: usize,
    /// Indices of the Huffman tables.
    pub(super) dc: usize,
    pub(super) ac: usize,
}

/// Everything that a scan needs. Huffman tables are kept as they are in the file: 16 counts, then the symbols.
#[derive(Debug)]
pub(super) struct Header<'a> {
    pub(super) width: usize,
    pub(super) height: usize,
    /// One or three.
    pub(super) count: usize,
    pub(super) components: [Component; 3],
    /// The greatest sampling factors, 1 or 2.
    pub(super) across: usize,
    pub(super) down: usize,
    /// In rows, not in the zigzag.
    pub(super) quantisation: [Option<[u16; 64]>; 4],
    pub(super) dc: [Option<&'a [u8]>; 4],
    pub(super) ac: [Option<&'a [u8]>; 4],
    /// Coefficients come bit by bit, and the exact decoder puts them together: tables are not looked for here.
    pub(super) is_progressive: bool,
    /// The entropy-coded data and whatever follows; all of a progressive file.
    pub(super) data: &'a [u8],
}

impl<'a> Header<'a> {
    /// The Huffman tables of a component, for first and other coefficients.
    pub(super) fn tables(&self, component: &Component) -> Option<[&'a [u8]; 2]> {
        Some([self.dc[component.dc]?, self.ac[component.ac]?])
    }

    /// None for a file that is damaged, or not simple.
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let mut header = Self {
            width: 0,
            height: 0,
            count: 0,
            components: [Component::default(); 3],
            across: 1,
            down: 1,
            quantisation: [None; 4],
            dc: [None; 4],
            ac: [None; 4],
            is_progressive: false,
            data: &[],
        };
        let (mut has_jfif, mut adobe, mut restarts) = (false, None, false);
        let mut rest = bytes.strip_prefix(&[0xff, 0xd8])?;
        loop {
            let (&[ones, marker], after) = rest.split_first_chunk()?;
            if ones != 0xff {
                return None;
            }
            if marker == 0xff {
                rest = &rest[1..];
                continue;
            }
            let body = after.get(2..short(after, 0)?)?;
            rest = &after[2 + body.len()..];
            match marker {
                0xc0..=0xc2 => {
                    header.frame(body)?;
                    header.is_progressive = marker == 0xc2;
                }
                0xc4 => header.huffman(body)?,
                0xc3..=0xcf | 0xd0..=0xd9 | 0x00 | 0x01 => return None,
                0xda if header.is_progressive => {
                    header.data = bytes;
                    break;
                }
                0xda if restarts => return None,
                0xda => {
                    header.scan(body)?;
                    header.data = rest;
                    break;
                }
                0xdb => header.quantisation(body)?,
                0xdd => restarts = short(body, 0)? > 0,
                0xe0 => has_jfif |= body.starts_with(b"JFIF\0"),
                0xee if body.starts_with(b"Adobe") => adobe = body.get(11).copied(),
                _ => {}
            }
        }
        // As `Decoder::space` has it: only grey and YCbCr go on from here.
        let ids = header.components.map(|c| c.id);
        let is_rgb = adobe == Some(0) || (adobe.is_none() && &ids == b"RGB");
        let is_simple = header.count == 1 || has_jfif || !is_rgb;
        (is_simple && header.width > 0).then_some(header)
    }

    fn frame(&mut self, body: &[u8]) -> Option<()> {
        if self.width > 0 || *body.first()? != 8 {
            return None;
        }
        (self.height, self.width) = (short(body, 1)?, short(body, 3)?);
        self.count = usize::from(*body.get(5)?);
        if self.width == 0
            || self.height == 0
            || self.width * self.height > MAX_PIXELS
            || !matches!(self.count, 1 | 3)
        {
            return None;
        }
        for (i, &[id, factors, table]) in
            body[6..].as_chunks().0.iter().take(self.count).enumerate()
        {
            let (across, down) = (usize::from(factors >> 4), usize::from(factors & 15));
            if !(1..=2).contains(&across) || !(1..=2).contains(&down) || table > 3 {
                return None;
            }
            self.components[i] = Component {
                id,
                across,
                down,
                table: usize::from(table),
                ..Component::default()
            };
        }
        let components = &mut self.components[..self.count];
        if let [grey] = components {
            // A scan of one component is of single blocks, whatever its factors.
            (grey.across, grey.down) = (grey.across.min(1), grey.down.min(1));
        }
        self.across = components.iter().map(|c| c.across).max()?;
        self.down = components.iter().map(|c| c.down).max()?;
        // Zero is a component that was cut off. The colours are as large as each other, or we would need more axes.
        let is_even = match components {
            [_, a, b] => (a.across, a.down) == (b.across, b.down),
            _ => true,
        };
        (is_even && components.iter().all(|c| c.across > 0)).then_some(())
    }

    fn huffman(&mut self, mut body: &'a [u8]) -> Option<()> {
        while let Some((&head, rest)) = body.split_first() {
            let (class, index) = (head >> 4, usize::from(head & 15));
            let total: usize = rest.get(..16)?.iter().map(|&n| usize::from(n)).sum();
            let (table, rest) = rest.split_at_checked(16 + total)?;
            if class > 1 || index > 3 || total > 256 {
                return None;
            }
            match class {
                0 => self.dc[index] = Some(table),
                _ => self.ac[index] = Some(table),
            }
            body = rest;
        }
        Some(())
    }

    fn quantisation(&mut self, mut body: &[u8]) -> Option<()> {
        while let Some((&head, rest)) = body.split_first() {
            let (is_wide, index) = (head >> 4 != 0, usize::from(head & 15));
            let (numbers, rest) = rest.split_at_checked(if is_wide { 128 } else { 64 })?;
            let mut table = [0; 64];
            for (k, &place) in ZIGZAG.iter().enumerate() {
                table[usize::from(place)] = match is_wide {
                    true => short(numbers, 2 * k)? as u16,
                    false => u16::from(numbers[k]),
                };
            }
            *self.quantisation.get_mut(index)? = Some(table);
            body = rest;
        }
        Some(())
    }

    fn scan(&mut self, body: &[u8]) -> Option<()> {
        let (&count, rest) = body.split_first()?;
        if self.count == 0 || usize::from(count) != self.count {
            return None;
        }
        for (component, &[id, tables]) in self.components[..self.count]
            .iter_mut()
            .zip(rest.as_chunks().0)
        {
            (component.dc, component.ac) = (usize::from(tables >> 4), usize::from(tables & 15));
            self.quantisation[component.table]?;
            let has_tables =
                self.dc.get(component.dc)?.is_some() && self.ac.get(component.ac)?.is_some();
            if component.id != id || !has_tables {
                return None;
            }
        }
        (rest.len() == 2 * self.count + 3).then_some(())
    }
}

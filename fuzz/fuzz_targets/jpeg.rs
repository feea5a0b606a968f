//! An image file on its way to a training image and to an evaluation's: the fast decoder, the exact one in both dialects,
//! PNG and WebP, crops and filters.

#![no_main]

use data::{Augment, Config, Crop, Decode, Format, Policy, Resize, Source};
use libfuzzer_sys::{Corpus, fuzz_target};

/// More pixels only take longer; that headers do not promise too many is a test.
const PIXELS: usize = 1 << 20;

/// Whether the first frame header of a JPEG promises more than that.
fn is_large(file: &[u8]) -> bool {
    let header = |w: &[u8]| w[0] == 0xff && matches!(w[1], 0xc0..=0xcf) && !matches!(w[1], 0xc4 | 0xc8 | 0xcc);
    let sizes = file.windows(9).filter(|w| header(w)).map(|w| {
        let number = |i: usize| usize::from(w[i]) << 8 | usize::from(w[i + 1]);
        number(5) * number(7)
    });
    sizes.max().is_some_and(|pixels| pixels > PIXELS)
}

fn config(resize: Resize, decode: Decode) -> Config {
    Config {
        source: Source::Shards {
            format: Format::TfRecord,
            shards: vec![],
            label_offset: 0,
            lanes: 1,
            shuffle_window: 1,
        },
        resolution: 32,
        batch_size: 1,
        seed: 7,
        classes: 10,
        crop: Crop::Torchvision {
            area: [0.08, 1.0],
            aspect: [0.75, 1.3333],
        },
        resize,
        decode,
        flip: true,
        crop_ratio: 0.875,
        max_bad_records: 0,
        threads: 1,
        cache: None,
        index: None,
        augment: Augment {
            policy: Policy::None,
            jitter: [0.0; 4],
            erasing: 0.0,
        },
    }
}

fuzz_target!(|input: (u8, &[u8])| -> Corpus {
    let (number, file) = input;
    if is_large(file) {
        return Corpus::Reject;
    }
    for resize in [Resize::Pillow, Resize::Tf1] {
        for decode in [Decode::Fast, Decode::Exact] {
            data::fuzz(&config(resize, decode), number.into(), file);
        }
    }
    Corpus::Keep
});

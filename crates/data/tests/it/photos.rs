//! Photographs through the whole preprocessing of evaluation, against Pillow and TensorFlow (tests/photos/goldens.py).

use std::path::Path;

use data::{Config, Pixels, Resize};

use crate::{config, example, write};

const SIZES: [usize; 2] = [224, 64];
const SAMPLES: usize = 256;

/// A photograph's name and the means of its resized images: pillow, tf, tf1 at 224, then at 64.
fn photos() -> Vec<(&'static str, Vec<f64>)> {
    let lines = include_str!("../photos/photos.txt").lines();
    lines
        .map(|line| {
            let mut words = line.split(' ');
            let name = words.next().unwrap();
            (name, words.skip(4).map(|n| n.parse().unwrap()).collect())
        })
        .collect()
}

fn floats(bytes: &[u8]) -> Vec<f64> {
    let floats = bytes.as_chunks().0.iter();
    floats.map(|&b| f64::from(f32::from_le_bytes(b))).collect()
}

/// Every photograph at both sizes: 256 values and the mean of all are within the tolerance.
fn check(resize: Resize, golden: &[f64], column: usize, tolerance: f64) {
    let photos = photos();
    let dir = tempfile::tempdir().unwrap();
    let shard = dir.path().join("photos");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/photos");
    write(
        &shard,
        photos.iter().map(|(name, _)| {
            let jpeg = std::fs::read(folder.join(format!("{name}.jpg"))).unwrap();
            example(&jpeg, 1)
        }),
    );
    assert_eq!(golden.len(), photos.len() * SIZES.len() * SAMPLES);
    let mut golden = golden.chunks(SAMPLES);
    let batches = SIZES.map(|resolution| {
        let config = Config {
            resolution,
            batch_size: 1,
            resize,
            ..config(std::slice::from_ref(&shard), 1, 1)
        };
        let batches = data::eval(&config).unwrap().map(Result::unwrap);
        batches.collect::<Vec<_>>()
    });
    for (i, (name, means)) in photos.iter().enumerate() {
        for (size, batches) in batches.iter().enumerate() {
            let pixels: Vec<f64> = match &batches[i].pixels {
                Pixels::U8(pixels) => pixels.iter().map(|&p| f64::from(p)).collect(),
                Pixels::F32(pixels) => pixels.iter().map(|&p| f64::from(p)).collect(),
            };
            let golden = golden.next().unwrap();
            let worst = (0..SAMPLES)
                .map(|i| (pixels[(7919 * i + 11) % pixels.len()] - golden[i]).abs())
                .fold(0.0, f64::max);
            let mean = pixels.iter().sum::<f64>() / pixels.len() as f64;
            let off = (mean - means[3 * size + column]).abs();
            let size = SIZES[size];
            assert!(worst <= tolerance, "{name} at {size}: off by {worst}");
            assert!(off <= tolerance, "{name} at {size}: mean off by {off}");
        }
    }
}

/// To the bit; the means are written with six digits.
#[test]
fn pillow_is_pillow() {
    let golden: Vec<f64> = include_bytes!("../photos/pillow.u8")
        .iter()
        .map(|&p| f64::from(p))
        .collect();
    check(Resize::Pillow, &golden, 0, 1e-6);
}

/// A thousandth of a level of 255: TensorFlow sums in another order, which moves the last bits.
#[test]
fn tf_is_tensorflow_2() {
    check(
        Resize::Tf,
        &floats(include_bytes!("../photos/tf.f32")),
        1,
        1e-3,
    );
}

#[test]
fn tf1_is_tensorflow_1() {
    check(
        Resize::Tf1,
        &floats(include_bytes!("../photos/tf1.f32")),
        2,
        1e-3,
    );
}

//! From 64 to 128 channels at half the resolution, without a projection.
use nn::{Basic, Head, Identity, Recipe, Stem, record};

fn main() {
    let net: (Stem, Basic<64, 128, 2, Identity>, Head<128>) = (Stem::default(), Default::default(), Head(10));
    record::<_, 224>(&net, Recipe::Tpu2018);
}

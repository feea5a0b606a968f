//! The stem gives 64 channels, the block wants 128.
use nn::{Basic, Head, Identity, Recipe, Stem, record};

fn main() {
    let net: (Stem, Basic<128, 128, 1, Identity>, Head<128>) = (Stem::default(), Default::default(), Head(10));
    record::<_, 224>(&net, Recipe::Tpu2018);
}

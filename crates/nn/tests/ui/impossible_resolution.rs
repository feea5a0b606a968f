//! 223 pixels cannot be halved.
use nn::{Head, Recipe, Stem, record};

fn main() {
    record::<_, 223>(&(Stem::default(), Head::<64>(10)), Recipe::Tpu2018);
}

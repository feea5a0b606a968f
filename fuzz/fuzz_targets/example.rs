//! A record's payload: a `tf.Example`.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = data::parse(bytes);
});

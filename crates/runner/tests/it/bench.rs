//! `runner bench`: what it says, never how fast.

use crate::{check, json};

const TINY: [&str; 9] = [
    "bench",
    "engine",
    "--depth",
    "18",
    "--resolution",
    "32",
    "--batch",
    "2",
    "--steps=1",
];

#[test]
fn bench_engine_measures() {
    let args = [&TINY[..], &["--threads", "2", "--json"]].concat();
    let report = json(&check(&args, 0).0);
    for (key, expected) in [
        ("depth", 18),
        ("resolution", 32),
        ("batch", 2),
        ("threads", 2),
    ] {
        assert_eq!(report[key], expected, "{report}");
    }
    assert_eq!(report["precision"], "f32");
    assert_eq!(report["mode"], "train");
    assert_eq!(report["winograd"], true);
    let number = |v: &serde_json::Value| v.as_f64().unwrap_or_else(|| panic!("{report}"));
    let rate = |key: &str| number(&report["images_per_s"][key]);
    assert!(0.0 < rate("min") && rate("min") <= rate("median") && rate("median") <= rate("max"));
    assert!(number(&report["steps"]) >= 1.0);
    assert!(number(&report["fraction_of_peak"]) > 0.0);
    let fraction = number(&report["flops"]) / number(&report["peak_flops"]);
    assert!((fraction - number(&report["fraction_of_peak"])).abs() < 1e-9);
    assert!(number(&report["planned_bytes"]) > 3.0 * 4.0 * 11_689_512.0);
    assert!(report["peak_resident_bytes"].is_u64(), "{report}");
    assert!(
        report["kernels"].is_null() && report["accounted"].is_null(),
        "{report}"
    );
}

#[test]
fn bench_engine_says_where_the_time_goes() {
    let infer = [
        "--mode",
        "infer",
        "--precision",
        "bf16",
        "--level",
        "portable",
        "--no-winograd",
    ];
    let args = [&TINY[..], &infer, &["--by-kernel", "--json"]].concat();
    let report = json(&check(&args, 0).0);
    assert_eq!(report["level"], "portable");
    assert_eq!(report["winograd"], false);
    let kernels = report["kernels"].as_array().unwrap();
    let sum: f64 = kernels.iter().map(|k| k["share"].as_f64().unwrap()).sum();
    let accounted = report["accounted"].as_f64().unwrap();
    assert!(
        (sum - accounted).abs() < 1e-9 && accounted > 0.0 && accounted <= 1.0,
        "{accounted}"
    );
    let convs = kernels
        .iter()
        .filter(|k| k["name"].as_str().unwrap().starts_with("conv "));
    let calls: f64 = convs.map(|k| k["calls_per_step"].as_f64().unwrap()).sum();
    assert_eq!(calls, 20.0, "convolutions of ResNet-18");

    let (text, _) = check(&[&TINY[..], &["--by-kernel"]].concat(), 0);
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[0], "resnet18 (torchvision), 32 px, 1000 classes");
    for start in ["steps ", "images/s ", "speed ", "memory ", "accounted "] {
        assert!(
            lines.iter().any(|line| line.starts_with(start)),
            "{start} in\n{text}"
        );
    }
    assert!(
        lines.iter().any(|line| line.ends_with("  update")),
        "{text}"
    );
    assert!(lines.iter().all(|line| line.len() <= 100), "{text}");
}

#[test]
fn bench_engine_refuses_what_it_cannot_run() {
    for (args, expected) in [
        (
            ["--depth", "51"],
            "[possible values: 18, 34, 50, 101, 152, 200, 270, 350, 420]",
        ),
        (
            ["--resolution", "33"],
            "invalid value '33' for '--resolution <R>'",
        ),
        (["--batch", "0"], "0 is not in 1..=65536"),
        (
            ["--level", "avx"],
            "[possible values: portable, avx2, avx512, avx512_bf16, amx]",
        ),
        (["--precision", "f16"], "[possible values: f32, bf16]"),
    ] {
        let (_, said) = check(&[&["bench", "engine"][..], &args].concat(), 2);
        assert!(said.contains(expected), "{expected} is missing in\n{said}");
    }
    // 65536 images take some 5 TiB.
    let (_, said) = check(&["bench", "engine", "--batch", "65536"], 4);
    assert!(said.starts_with("--batch 65536: needs "), "{said}");
    assert!(
        said.contains("\nhint: --batch ") && said.ends_with(" fits\n"),
        "{said}"
    );
}

//! Counts against the reference table, names against torchvision's, and what must not compile.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use graph::{Init, Op};
use nn::{
    Blocks, DEPTHS, RESOLUTIONS, Recipe, Squares, Stem, Unsupported, Variant, resnet, resnet_with,
};

fn check_counts(recipe: Recipe, depth: usize, classes: usize, params: usize) {
    let graph = resnet(depth, 224, classes, recipe).unwrap();
    assert_eq!(
        graph.counts().params,
        params,
        "{recipe:?} {depth} with {classes} classes"
    );
}

/// docs/reference/spec.md §4.2: depth, trainable, conv, BN, linear, decayed, tensors, convs, MACs.
const REFERENCE: [[usize; 9]; 9] = [
    [
        18,
        11_693_736,
        11_171_008,
        9_728,
        513_000,
        11_684_008,
        65,
        21,
        1_826_918_400,
    ],
    [
        34,
        21_801_896,
        21_271_744,
        17_152,
        513_000,
        21_784_744,
        113,
        37,
        3_676_606_464,
    ],
    [
        50,
        25_557_032,
        23_454_912,
        53_120,
        2_049_000,
        25_503_912,
        161,
        53,
        4_089_184_256,
    ],
    [
        101,
        44_549_160,
        42_394_816,
        105_344,
        2_049_000,
        44_443_816,
        314,
        104,
        7_801_405_440,
    ],
    [
        152,
        60_192_808,
        57_992_384,
        151_424,
        2_049_000,
        60_041_384,
        467,
        155,
        11_513_626_624,
    ],
    [
        200,
        64_673_832,
        62_448_832,
        176_000,
        2_049_000,
        64_497_832,
        611,
        203,
        15_007_481_856,
    ],
    [
        270,
        89_599_272,
        87_307_456,
        242_816,
        2_049_000,
        89_356_456,
        827,
        275,
        20_248_264_704,
    ],
    [
        350,
        112_786_216,
        110_425_280,
        311_936,
        2_049_000,
        112_474_280,
        1061,
        353,
        25_925_779_456,
    ],
    [
        420,
        131_784_488,
        129_365_184,
        370_304,
        2_049_000,
        131_414_184,
        1268,
        422,
        30_948_196_352,
    ],
];

#[test]
fn counts_equal_the_reference() {
    for [
        depth,
        params,
        conv,
        norm,
        linear,
        decayed,
        tensors,
        convs,
        macs,
    ] in REFERENCE
    {
        let counts = resnet(depth, 224, 1000, Recipe::Tpu2018).unwrap().counts();
        let ours = [
            depth,
            counts.params,
            counts.conv_params,
            counts.norm_params,
            counts.linear_params,
            counts.decayed_params,
            counts.tensors,
            counts.convs,
            counts.macs,
        ];
        assert_eq!(
            ours,
            [
                depth, params, conv, norm, linear, decayed, tensors, convs, macs
            ]
        );
        assert_eq!(counts.running_statistics, norm);
        let stem = 112 * 112 * 64 * 7 * 7 * 3;
        assert_eq!(counts.training_macs, 3 * macs - stem);
    }
}

#[test]
fn counts_equal_torchvision() {
    // torchvision 18/34 lack the projection of group 1; from 50 on both recipes are one network.
    for (depth, params) in [
        (18, 11_689_512),
        (34, 21_797_672),
        (50, 25_557_032),
        (101, 44_549_160),
    ] {
        check_counts(Recipe::Torchvision, depth, 1000, params);
    }
    for (depth, params) in [(152, 60_192_808), (200, 64_673_832)] {
        check_counts(Recipe::Torchvision, depth, 1000, params);
    }
}

#[test]
fn counts_of_ten_classes_equal_the_reference() {
    let params = [
        11_185_866, 21_294_026, 23_528_522, 42_520_650, 58_164_298, 62_645_322,
    ];
    for (depth, params) in DEPTHS.into_iter().zip(params) {
        check_counts(Recipe::Tpu2018, depth, 10, params);
    }
}

/// The names are timm's (`resnet50d`, and `maxpool.0` of `resnetrs50`).
#[test]
fn stems_have_their_convolutions() {
    let plain = resnet(50, 224, 1000, Recipe::Torchvision).unwrap();
    let with = |is_deep, has_conv_pool| {
        let stem = Stem {
            is_deep,
            has_conv_pool,
        };
        let variant = Variant {
            stem,
            ..Variant::default()
        };
        let graph = resnet_with(variant, 50, 224, 1000, Recipe::Torchvision).unwrap();
        assert_eq!(
            graph.nodes().last().unwrap().plane,
            plain.nodes().last().unwrap().plane
        );
        let params = graph.params().iter();
        let of_stem = params.filter(|p| !p.name.starts_with("layer") && !p.name.starts_with("fc"));
        let weights = of_stem.filter(|p| p.shape.len() == 4);
        let weights: Vec<_> = weights.map(|p| (p.name.clone(), p.shape.clone())).collect();
        let more = graph.counts().params as i64 - plain.counts().params as i64;
        (weights, more)
    };
    let named = |name: &str, shape: [usize; 4]| (name.to_string(), shape.to_vec());
    let seven = named("conv1.weight", [64, 3, 7, 7]);
    let deep = [
        named("conv1.0.weight", [32, 3, 3, 3]),
        named("conv1.3.weight", [32, 32, 3, 3]),
        named("conv1.6.weight", [64, 32, 3, 3]),
    ];
    let pool = named("maxpool.0.weight", [64, 64, 3, 3]);
    assert_eq!(with(false, false), (vec![seven.clone()], 0));
    // timm has 25.58 million for resnet50d, whose shortcuts add none.
    assert_eq!(with(true, false), (deep.to_vec(), 19_232));
    let pooled = 64 * 64 * 9 + 2 * 64;
    assert_eq!(with(false, true), (vec![seven, pool.clone()], pooled));
    let both = [&deep[..], &[pool]].concat();
    assert_eq!(with(true, true), (both, 19_232 + pooled));
}

const RESNET_RS: Variant = Variant {
    stem: Stem {
        is_deep: true,
        has_conv_pool: true,
    },
    blocks: Blocks {
        has_mean_shortcut: true,
        squeeze: Some(0.25),
        are_dropped: true,
        squares: None,
    },
};

/// docs/reference/vectors.json, `resnet_rs`: depth, resolution, trainable, conv, BN, SE, convs, MACs.
#[test]
fn counts_of_resnet_rs_equal_the_reference() {
    let vectors = include_str!("../../../../docs/reference/vectors.json");
    let vectors: serde_json::Value = serde_json::from_str(vectors).unwrap();
    let all = vectors["resnet_rs"].as_object().unwrap();
    assert_eq!(all.len(), 11);
    for (name, counts) in all {
        let (depth, resolution) = name.split_once("_i").unwrap();
        let (depth, resolution) = (depth.parse().unwrap(), resolution.parse().unwrap());
        let graph = resnet_with(RESNET_RS, depth, resolution, 1000, Recipe::Tpu2018).unwrap();
        let ours = graph.counts();
        let number = |key: &str| counts[key].as_u64().unwrap() as usize;
        assert_eq!(
            [
                ours.params,
                ours.conv_params,
                ours.norm_params,
                ours.squeeze_params,
                ours.linear_params,
                ours.convs,
                ours.macs
            ],
            ["total", "conv", "bn", "se", "dense", "nconv", "macs"].map(number),
            "{name}"
        );
    }
}

/// The names are timm's (`resnetrs50`), the rates by group the reference's.
#[test]
fn blocks_of_resnet_rs() {
    let graph = resnet_with(RESNET_RS, 50, 160, 1000, Recipe::Torchvision).unwrap();
    let shape = |name: &str| {
        let param = graph.params().iter().find(|p| p.name == name);
        param.unwrap_or_else(|| panic!("{name}")).shape.clone()
    };
    assert_eq!(shape("layer1.0.se.fc1.weight"), [64, 256, 1, 1]);
    assert_eq!(shape("layer1.0.se.fc2.weight"), [256, 64, 1, 1]);
    assert_eq!(shape("layer4.2.se.fc2.bias"), [2048]);
    assert_eq!(shape("layer1.0.downsample.1.weight"), [256, 64, 1, 1]);
    assert_eq!(shape("layer2.0.downsample.2.weight"), [512]);
    let means = graph.nodes().iter().filter(|n| n.op == Op::HalfPool);
    let means: Vec<_> = means.map(|n| (n.name.as_str(), n.plane.h)).collect();
    let halves = [
        ("layer2.0.downsample.0", 20),
        ("layer3.0.downsample.0", 10),
        ("layer4.0.downsample.0", 5),
    ];
    assert_eq!(means, halves);
    let paths = graph.nodes().iter().filter_map(|n| match n.op {
        Op::DropPath(path) => Some((path.block, path.share)),
        _ => None,
    });
    let groups = [2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 5, 5, 5];
    let expected = groups
        .iter()
        .enumerate()
        .map(|(block, group)| (block, [*group, 5]));
    assert!(paths.eq(expected));
}

/// After every normalisation of a block of those groups, and on each of their shortcuts.
#[test]
fn squares_are_dropped_in_the_groups_that_are_named() {
    let variant = |groups| Variant {
        blocks: Blocks {
            squares: Some(Squares { side: 7, groups }),
            ..Blocks::default()
        },
        ..Variant::default()
    };
    let blocks = |depth, groups| {
        let graph = resnet_with(variant(groups), depth, 64, 10, Recipe::Tpu2018).unwrap();
        let blocks = graph.nodes().iter().filter_map(|n| match n.op {
            Op::DropBlock(block) => Some((n.name.clone(), block)),
            _ => None,
        });
        blocks.collect::<Vec<_>>()
    };
    let last = blocks(50, [false, false, true, true]);
    assert_eq!(last.len(), 4 * (6 + 3));
    for (number, (name, block)) in last.iter().enumerate() {
        let share = if name.starts_with("layer3.") { 4 } else { 1 };
        assert_eq!(
            (block.number, block.side, block.share),
            (number, 7, [1, share])
        );
    }
    let first = blocks(18, [true, false, false, false]);
    assert_eq!(first.len(), 3 * 2);
    assert!(
        first
            .iter()
            .all(|(name, block)| name.starts_with("layer1.") && block.share == [1, 64])
    );
    assert_eq!(blocks(18, [false; 4]), []);
}

#[test]
fn macs_follow_the_resolution() {
    for (resolution, macs) in [
        (128, 1_336_623_104),
        (160, 2_087_321_600),
        (192, 3_004_841_984),
        (288, 6_758_334_464),
        (320, 8_343_142_400),
    ] {
        assert_eq!(
            resnet(50, resolution, 1000, Recipe::Tpu2018)
                .unwrap()
                .counts()
                .macs,
            macs
        );
    }
}

#[test]
fn names_are_torchvisions() {
    let graph = resnet(50, 224, 1000, Recipe::Torchvision).unwrap();
    let names: Vec<_> = graph.params().iter().map(|p| p.name.as_str()).collect();
    assert_eq!(
        &names[..4],
        [
            "conv1.weight",
            "bn1.weight",
            "bn1.bias",
            "layer1.0.conv1.weight"
        ]
    );
    for name in [
        "layer1.0.downsample.1.bias",
        "layer4.2.conv3.weight",
        "layer4.2.bn3.weight",
        "fc.weight",
        "fc.bias",
    ] {
        assert!(names.contains(&name), "{name} is missing");
    }
    let unique: std::collections::BTreeSet<_> = names.iter().collect();
    assert_eq!(unique.len(), names.len());
}

#[test]
fn recipes_start_and_pad_differently() {
    let find = |recipe, name: &str| {
        let graph = resnet(18, 224, 10, recipe).unwrap();
        graph
            .params()
            .iter()
            .find(|p| p.name == name)
            .map(|p| p.init)
    };
    // §4.1: sigma of the 7x7x3 stem is 0.0824786, of 3x3x64 0.0416667.
    let Some(Init::TruncatedNormal { std }) = find(Recipe::Tpu2018, "conv1.weight") else {
        panic!("not truncated")
    };
    assert!((std - 0.0824786).abs() < 1e-7);
    let Some(Init::Normal { std }) = find(Recipe::Torchvision, "layer1.0.conv1.weight") else {
        panic!("not normal")
    };
    assert!((std - (2.0f64 / 576.0).sqrt()).abs() < 1e-12);
    assert_eq!(
        find(Recipe::Tpu2018, "layer1.0.bn2.weight"),
        Some(Init::Constant(0.0))
    );
    assert_eq!(
        find(Recipe::Tpu2018, "layer1.0.downsample.1.weight"),
        Some(Init::Constant(1.0))
    );
    assert_eq!(
        find(Recipe::Torchvision, "layer1.0.bn2.weight"),
        Some(Init::Constant(1.0))
    );
    assert_eq!(
        find(Recipe::Torchvision, "layer1.0.downsample.1.weight"),
        None
    );
    assert_eq!(find(Recipe::Tpu2018, "fc.bias"), Some(Init::Constant(0.0)));
    for (recipe, pad) in [(Recipe::Tpu2018, 0), (Recipe::Torchvision, 1)] {
        let graph = resnet(50, 224, 10, recipe).unwrap();
        let pools = graph.nodes().iter().filter_map(|n| match n.op {
            Op::MaxPool { pad_before, .. } => Some(pad_before),
            _ => None,
        });
        assert_eq!(pools.collect::<Vec<_>>(), [pad]);
    }
}

#[test]
fn every_resolution_ends_in_a_pooled_plane() {
    for &resolution in RESOLUTIONS {
        let graph = resnet(18, resolution, 10, Recipe::Tpu2018).unwrap();
        let last = graph.nodes().iter().rfind(|n| n.op == Op::Add).unwrap();
        assert_eq!(
            (last.plane.h, last.plane.w, last.plane.c),
            (resolution / 32, resolution / 32, 512)
        );
    }
}

#[test]
fn what_is_not_compiled_in_is_refused() {
    assert_eq!(
        resnet(51, 224, 10, Recipe::Tpu2018).unwrap_err(),
        Unsupported::Depth(51)
    );
    let error = resnet(50, 223, 10, Recipe::Tpu2018).unwrap_err();
    assert_eq!(
        error.to_string(),
        "resolution 223 is not a multiple of 32 from 32 to 448"
    );
}

#[test]
fn mistakes_do_not_compile() {
    trybuild::TestCases::new().compile_fail("tests/ui/*.rs");
}

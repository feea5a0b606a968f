//! The CUDA engine on a card, against the oracle and the CPU engine. Without a card each test says that it is skipped;
//! with REQUIRE_CUDA=1 that is a failure.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};

use engine::cpu::{self, Cpu};
use engine::cuda::{Convolutions, Cuda, Options, Precision, Ranks, cards};
use engine::oracle::Oracle;
use engine::{AVERAGE_PREFIX, Cache, Decay, Dropout, Engine, Hyper, Rule, State, initial_state};
use graph::{Graph, Init, Plane, ValueId};

use crate::goldens::{Make, ROUNDING, SWITCHED, check_half, check_network};
use crate::{Data, NORMAL, Random, conv_bn, error, hyper, middle, worst};

/// Where there is no card, the same tests on one that is made up (tests/card): driver, NVRTC and cuDNN as libraries that
/// compute on the host, and nothing before somebody waits for it. So all of the engine runs but the card's own code.
#[test]
fn a_card_that_is_made_up() {
    let is_real = cards().is_ok_and(|cards| !cards.is_empty());
    if is_real {
        eprintln!("skipped: there is a card");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let compile = |source: &str, out: &str, define: &str| {
        Command::new("c++")
            .args([
                "-O2",
                "-std=c++17",
                "-shared",
                "-fPIC",
                "-ffp-contract=off",
                define,
                "-o",
            ])
            .arg(folder.path().join(out))
            .args([root.join(source).as_os_str(), "-ldl".as_ref()])
            .status()
    };
    match compile("tests/card/card.cpp", "libcuda.so", "-DCARD") {
        Err(_) => {
            eprintln!("skipped: there is no C++ compiler (c++)");
            return;
        }
        Ok(status) => assert!(status.success(), "the compiler refuses card.cpp"),
    }
    for name in ["libnvrtc.so", "libcudnn.so", "libnccl.so.2"] {
        std::os::unix::fs::symlink("libcuda.so", folder.path().join(name)).unwrap();
    }
    for element in 0..3 {
        let define = format!("-DELEMENT={element}");
        let status = compile("src/cuda/shim.cpp", &format!("shim{element}.so"), &define);
        assert!(status.unwrap().success(), "the compiler refuses kernels.cu");
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["cuda::cuda_", "--test-threads", "1", "--nocapture"])
        .env("LD_LIBRARY_PATH", folder.path())
        .env("REQUIRE_CUDA", "1")
        .env("MADE_UP_CARD", "1")
        .env("MADE_UP_CARDS", "3")
        .output()
        .unwrap();
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{said}");
    assert!(said.contains("test result: ok. 15 passed"), "{said}");
}

/// Whether the card is one that computes by plain loops, so that large networks would take too long.
fn is_made_up() -> bool {
    std::env::var_os("MADE_UP_CARD").is_some()
}

/// Whether there is a card.
fn has_card() -> bool {
    match cards() {
        Ok(cards) if !cards.is_empty() => true,
        found => {
            assert!(
                std::env::var_os("REQUIRE_CUDA").is_none(),
                "REQUIRE_CUDA is set, but there is no card: {found:?}"
            );
            eprintln!("skipped: there is no card");
            false
        }
    }
}

/// On the first card. One that is made up needs little workspace, and races take it long.
fn options(micro_batch: usize, precision: Precision) -> Options {
    let options = Options::new(0, micro_batch, precision);
    match is_made_up() {
        true => Options {
            workspace: 16 << 20,
            convolutions: Convolutions::Cudnn,
            ..options
        },
        false => options,
    }
}

fn engine(graph: &Graph, micro_batch: usize, precision: Precision, state: &State) -> Cuda {
    cached_engine(graph, micro_batch, precision, state, cache())
}

fn cached_engine(
    graph: &Graph,
    micro_batch: usize,
    precision: Precision,
    state: &State,
    cache: Box<dyn Cache>,
) -> Cuda {
    let options = options(micro_batch, precision);
    Cuda::new(graph, &options, state, cache).unwrap_or_else(|e| panic!("{e}"))
}

/// Engines that share it choose the same plans.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<BTreeMap<String, Vec<u8>>>>);

impl Cache for Shared {
    fn get(&self, name: &str) -> Option<Vec<u8>> {
        self.0.lock().unwrap().get(name).cloned()
    }

    fn put(&self, name: &str, bytes: &[u8]) {
        self.0.lock().unwrap().insert(name.into(), bytes.into());
    }
}

/// That of all tests which need none of their own: kernels are compiled once.
fn cache() -> Box<Shared> {
    static ALL: OnceLock<Shared> = OnceLock::new();
    Box::new(ALL.get_or_init(Shared::default).clone())
}

fn bottleneck(g: &mut Graph, name: &str, x: ValueId, out: usize, stride: usize) -> ValueId {
    let a = conv_bn(g, &format!("{name}.a"), x, 16, 1, 1);
    let a = g.relu(&format!("{name}.a.relu"), a);
    let b = conv_bn(g, &format!("{name}.b"), a, 32, 3, stride);
    let b = g.relu(&format!("{name}.b.relu"), b);
    let main = conv_bn(g, &format!("{name}.c"), b, out, 1, 1);
    let side = match stride == 1 && g.plane(x).c == out {
        true => x,
        false => conv_bn(g, &format!("{name}.side"), x, out, 1, stride),
    };
    let sum = g.add(&format!("{name}.add"), main, side);
    g.relu(&format!("{name}.relu"), sum)
}

fn network(plane: Plane, pad: usize, classes: usize) -> Graph {
    let mut g = Graph::new(plane);
    let image = g.input();
    let x = conv_bn(&mut g, "stem", image, 32, 7, 2);
    let x = g.relu("stem.relu", x);
    let mut x = g.max_pool("pool", x, pad);
    x = bottleneck(&mut g, "one", x, 64, 1);
    x = bottleneck(&mut g, "two", x, 64, 1);
    x = bottleneck(&mut g, "three", x, 96, 2);
    let x = g.avg_pool("pooled", x);
    g.linear("fc", x, classes, NORMAL, Init::Uniform { bound: 0.1 });
    g
}

/// A step in two micro-batches and the scores after it against the oracle. `loss` is the most that the loss may be off by,
/// `gradient` that of the middle one of all gradients; the logits and nine in ten of all tensors, twice that.
fn check(precision: Precision, loss: f64, gradient: f64) {
    if has_card() {
        check_with(&options(8, precision), loss, gradient);
    }
}

fn check_with(options: &Options, loss: f64, gradient: f64) {
    let precision = options.precision;
    for (seed, plane) in [Plane { h: 32, w: 48, c: 3 }, Plane { h: 33, w: 29, c: 3 }]
        .into_iter()
        .enumerate()
    {
        let r = &mut Random::new(seed as u64 + 1);
        let graph = network(plane, seed % 2, 10 + seed);
        let state = initial_state(&graph, seed as u64);
        let data = Data::new(r, &graph, 16);
        let mut truth = Oracle::new(&graph, 8, &state).unwrap();
        let mut ours = Cuda::new(&graph, options, &state, cache()).unwrap();
        let told = truth.train_step(&data.batch(), &hyper()).unwrap();
        let seen = ours.train_step(&data.batch(), &hyper()).unwrap();
        assert_eq!(seen.images, told.images);
        let gap = (seen.loss() - told.loss()).abs() / told.loss();
        let (mut a, b) = (ours.state().unwrap(), truth.state().unwrap());
        a.remove(engine::LOSS_SCALE);
        let mut errors: Vec<(f64, &String)> = b.keys().map(|n| (error(&a, &b, n), n)).collect();
        errors.sort_by(|a, b| a.0.total_cmp(&b.0));
        let nine = errors[errors.len() * 9 / 10];
        println!(
            "{precision}, {plane:?}: loss {gap:.1e}, worst {:.1e} ({}), nine in ten {:.1e}, middle {:.1e}",
            worst(&a, &b).0,
            worst(&a, &b).1,
            nine.0,
            middle(&a, &b)
        );
        let steep = 2.0 * gradient;
        assert!(gap < loss, "{precision}: loss {seen:?}, {told:?}");
        assert!(nine.0 < steep, "{precision}: {} {}", nine.1, nine.0);
        let middle = middle(&a, &b);
        assert!(middle < gradient, "{precision}: {middle}");

        // Scores of a batch that is not whole.
        ours.load(&b).unwrap();
        let data = Data::new(r, &graph, 13);
        let told = truth.eval_step(&data.batch()).unwrap();
        let seen = ours.eval_step(&data.batch()).unwrap();
        assert_eq!(seen.images, 13);
        let gap = (seen.loss() - told.loss()).abs() / told.loss();
        assert!(gap < steep, "{precision}: {seen:?}, {told:?}");
        let (a, b) = (
            ours.predict(data.batch().pixels).unwrap(),
            truth.predict(data.batch().pixels).unwrap(),
        );
        assert_eq!(a.len(), b.len());
        let size = b.iter().map(|v| v.abs()).fold(0.0, f32::max);
        for (a, b) in a.iter().zip(&b) {
            assert!(
                f64::from((a - b).abs() / size) < steep,
                "{precision}: {a}, {b}"
            );
        }
    }
}

// A ReLU of a small network that switches where the oracle's does not changes whole gradients; so those of 16 bits are
// off by as much as on the CPU (tests/it/main.rs), and f32 says that the sums are the right ones.
#[test]
fn cuda_f32() {
    check(Precision::F32, 1e-6, 1e-5);
}

#[test]
fn cuda_tf32() {
    check(Precision::Tf32, 1e-3, 0.15);
}

#[test]
fn cuda_bf16() {
    check(Precision::Bf16, 5e-3, 0.35);
}

#[test]
fn cuda_f16() {
    check(Precision::F16, 1e-3, 0.15);
}

fn steps(engine: &mut dyn Engine, data: &[Data], hyper: &Hyper) {
    for data in data {
        engine.train_step(&data.batch(), hyper).unwrap();
    }
}

/// The same without cuDNN.
#[test]
fn cuda_own_convolutions() {
    if !has_card() {
        return;
    }
    let own = |precision| Options {
        convolutions: Convolutions::Own,
        ..options(8, precision)
    };
    for (precision, loss, gradient) in [
        (Precision::F32, 1e-6, 1e-5),
        (Precision::Tf32, 1e-3, 0.15),
        (Precision::Bf16, 5e-3, 0.35),
        (Precision::F16, 1e-3, 0.15),
    ] {
        check_with(&own(precision), loss, gradient);
    }
}

/// Every convolution of ResNet-50 by our own kernels against cuDNN's, in whole steps.
#[test]
fn cuda_own_convolutions_are_cudnns() {
    if !has_card() {
        return;
    }
    let (graph, images) = match is_made_up() {
        true => (network(Plane { h: 32, w: 32, c: 3 }, 1, 10), 8),
        false => (nn::resnet(50, 224, 1000, nn::Recipe::Tpu2018).unwrap(), 32),
    };
    let state = initial_state(&graph, 1);
    let data = Data::new(&mut Random::new(5), &graph, images);
    let step = |convolutions| {
        let options = Options {
            convolutions,
            ..options(images, Precision::F32)
        };
        let mut engine = Cuda::new(&graph, &options, &state, cache()).unwrap();
        println!("{}", engine.describe());
        let metrics = engine.train_step(&data.batch(), &hyper()).unwrap();
        (metrics, engine.state().unwrap())
    };
    let (told, cudnn) = step(Convolutions::Cudnn);
    let (seen, own) = step(Convolutions::Own);
    assert!((seen.loss() - told.loss()).abs() < 1e-5 * told.loss());
    // A ReLU that switches changes whole gradients a little; a wrong product, much.
    let (worst, middle) = (worst(&own, &cudnn), middle(&own, &cudnn));
    println!("worst {:.1e} ({}), middle {middle:.1e}", worst.0, worst.1);
    assert!(worst.0 < 5e-2 && middle < 1e-3, "{worst:?}, {middle}");
}

/// Whole networks against PyTorch in float64, tensor by tensor.
#[test]
fn cuda_goldens_f32() {
    if !has_card() {
        return;
    }
    let make: Make = |graph, images, state| Box::new(engine(graph, images, Precision::F32, state));
    if is_made_up() {
        return check_network("resnet18-64-tpu2018", make, ROUNDING);
    }
    // Which ReLUs rounding switches depends on cuDNN's order of sums.
    for name in [
        "resnet18-64-torchvision",
        "resnet18-64-tpu2018",
        "resnet18-64-rs",
        "resnet50-64-torchvision",
        "resnet50-64-tpu2018",
        "resnet50-64-rs",
        "resnet50-224-torchvision",
        "resnet50-224-tpu2018",
    ] {
        check_network(name, make, SWITCHED);
    }
}

/// In 16 bits as near to float64 as PyTorch's autocast, half as much again at most; also without cuDNN.
#[test]
fn cuda_goldens_half() {
    if !has_card() {
        return;
    }
    let bf16: Make = |graph, images, state| Box::new(engine(graph, images, Precision::Bf16, state));
    let f16: Make = |graph, images, state| Box::new(engine(graph, images, Precision::F16, state));
    let own: Make = |graph, images, state| {
        let options = Options {
            convolutions: Convolutions::Own,
            ..options(images, Precision::Bf16)
        };
        Box::new(Cuda::new(graph, &options, state, cache()).unwrap())
    };
    if is_made_up() {
        return check_half("resnet18-64-torchvision", bf16);
    }
    for name in [
        "resnet18-64-torchvision",
        "resnet18-64-tpu2018",
        "resnet50-64-torchvision",
        "resnet50-64-tpu2018",
    ] {
        for make in [bf16, f16, own] {
            check_half(name, make);
        }
    }
}

/// Networks with factors of branches, dropped branches and squares, and means in shortcuts, as the CPU trains them.
#[test]
fn cuda_branches() {
    if !has_card() {
        return;
    }
    let (depth, resolution, images) = match is_made_up() {
        true => (18, 32, 8),
        false => (50, 64, 32),
    };
    let plain = nn::Blocks {
        has_mean_shortcut: false,
        squeeze: None,
        are_dropped: false,
        squares: None,
    };
    for blocks in [
        nn::Blocks {
            has_mean_shortcut: true,
            squeeze: Some(0.25),
            are_dropped: true,
            ..plain
        },
        nn::Blocks {
            squares: Some(nn::Squares {
                side: 3,
                groups: [false, false, true, true],
            }),
            ..plain
        },
    ] {
        let stem = nn::Stem {
            is_deep: true,
            has_conv_pool: true,
        };
        let variant = nn::Variant { stem, blocks };
        let recipe = nn::Recipe::Torchvision;
        let graph = nn::resnet_with(variant, depth, resolution, 10, recipe).unwrap();
        let state = initial_state(&graph, 2);
        let data = Data::new(&mut Random::new(7), &graph, images);
        let hyper = Hyper {
            lr: 0.01,
            dropout: Some(Dropout {
                rate: 0.25,
                path_rate: 0.2,
                block_rate: 0.2,
                seed: 1,
                step: 3,
            }),
            ..hyper()
        };
        let mut ours = engine(&graph, images / 2, Precision::F32, &state);
        let mut cpu = Cpu::new(&graph, &cpu::Options::new(images / 2, 2), &state).unwrap();
        let (seen, told) = (
            ours.train_step(&data.batch(), &hyper).unwrap(),
            cpu.train_step(&data.batch(), &hyper).unwrap(),
        );
        assert!((seen.loss() - told.loss()).abs() < 1e-5 * told.loss());
        // A ReLU that switches changes whole gradients a little; a wrong mask, much.
        let (worst, middle) = (
            worst(&ours.state().unwrap(), &cpu.state().unwrap()),
            middle(&ours.state().unwrap(), &cpu.state().unwrap()),
        );
        println!("worst {:.1e} ({}), middle {middle:.1e}", worst.0, worst.1);
        assert!(worst.0 < 5e-2 && middle < 1e-3, "{worst:?}, {middle}");
        let (seen, told) = (
            ours.eval_step(&data.batch()).unwrap(),
            cpu.eval_step(&data.batch()).unwrap(),
        );
        assert!((seen.loss() - told.loss()).abs() < 1e-3 * told.loss());
    }
}

/// Whoever is the fastest: on a card that is made up now one and now another, and each is remembered.
#[test]
fn cuda_races() {
    if !has_card() {
        return;
    }
    for (precision, loss, gradient) in [(Precision::F32, 1e-6, 1e-5), (Precision::Bf16, 5e-3, 0.35)]
    {
        let fastest = Options {
            convolutions: Convolutions::Fastest,
            ..options(8, precision)
        };
        check_with(&fastest, loss, gradient);
    }
    let graph = network(Plane { h: 32, w: 32, c: 3 }, 1, 10);
    let state = initial_state(&graph, 1);
    let data = Data::new(&mut Random::new(5), &graph, 8);
    let cache = Shared::default();
    let step = || {
        let options = Options {
            convolutions: Convolutions::Fastest,
            ..options(8, Precision::Bf16)
        };
        let mut engine = Cuda::new(&graph, &options, &state, Box::new(cache.clone())).unwrap();
        engine.train_step(&data.batch(), &hyper()).unwrap();
        engine.state().unwrap()
    };
    let first = step();
    assert!(first == step(), "the winners are remembered");
    let known = cache.0.lock().unwrap();
    let races = known.iter().filter(|(name, _)| name.starts_with("cudnn"));
    let won = races
        .clone()
        .filter(|(_, winner)| *winner == b"own")
        .count();
    println!("{won} of {} are our own", races.clone().count());
    // The clock of the card that is made up lets both win.
    assert!(!is_made_up() || (won > 0 && won < races.count()));
}

/// The same bits again, by steps that overlap, and through a state in the middle.
#[test]
fn cuda_bits_repeat() {
    if !has_card() {
        return;
    }
    let (graph, images) = match is_made_up() {
        true => (network(Plane { h: 32, w: 32, c: 3 }, 1, 10), 8),
        false => (nn::resnet(18, 64, 10, nn::Recipe::Tpu2018).unwrap(), 32),
    };
    let state = initial_state(&graph, 1);
    let r = &mut Random::new(5);
    let data: Vec<Data> = (0..6).map(|_| Data::new(r, &graph, images)).collect();
    for precision in [Precision::Bf16, Precision::F16] {
        let cache = Shared::default();
        let engine = |state: &State| {
            cached_engine(&graph, images, precision, state, Box::new(cache.clone()))
        };
        let mut straight = engine(&state);
        steps(&mut straight, &data, &hyper());
        let end = straight.state().unwrap();

        let mut overlapping = engine(&state);
        let mut under_way = None;
        for data in &data {
            let step = overlapping.start_step(&data.batch(), &hyper()).unwrap();
            if let Some(before) = under_way.replace(step) {
                overlapping.finish_step(before).unwrap();
            }
        }
        overlapping.finish_step(under_way.unwrap()).unwrap();
        assert!(
            end == overlapping.state().unwrap(),
            "{precision}: overlapping"
        );

        let mut first = engine(&state);
        steps(&mut first, &data[..3], &hyper());
        let middle = first.state().unwrap();
        drop(first);
        let mut second = engine(&middle);
        // An evaluation in between changes nothing.
        second.eval_step(&data[0].batch()).unwrap();
        steps(&mut second, &data[3..], &hyper());
        assert!(end == second.state().unwrap(), "{precision}: resumed");
    }
}

/// Several cards, or the one that there is, train to the bits of one that sees as many micro-batches, and score alike.
#[test]
fn cuda_ranks() {
    if !has_card() {
        return;
    }
    let ordinals: Vec<usize> = (0..cards().unwrap().len().min(4)).collect();
    let (ranks, micro_batch) = (ordinals.len(), 4);
    let graph = network(Plane { h: 32, w: 32, c: 3 }, 1, 10);
    let images = ranks * micro_batch;
    let r = &mut Random::new(11);
    let data: Vec<Data> = (0..3).map(|_| Data::new(r, &graph, images)).collect();
    let mut state = initial_state(&graph, 1);
    for (name, tensor) in state.clone() {
        state.insert(format!("{AVERAGE_PREFIX}{name}"), tensor);
    }
    let dropout = Dropout {
        rate: 0.3,
        path_rate: 0.0,
        block_rate: 0.0,
        seed: 1,
        step: 2,
    };
    let hyper = Hyper {
        rule: Rule::Lars { trust: 0.01 },
        nesterov: false,
        decay: Decay::NoNormNoBias,
        clip_norm: Some(2.0),
        average: Some(0.9),
        dropout: Some(dropout),
        ..hyper()
    };
    for precision in [Precision::F32, Precision::F16] {
        let options = Options {
            average: true,
            ..options(micro_batch, precision)
        };
        let cache = Shared::default();
        let boxed = || Box::new(cache.clone());
        let mut one = Cuda::new(&graph, &options, &state, boxed()).unwrap();
        let mut all = Ranks::new(&graph, &ordinals, &options, &state, boxed()).unwrap();
        println!("{}", all.describe());
        let mut under_way = None;
        for data in &data {
            let told = one.train_step(&data.batch(), &hyper).unwrap();
            let step = all.start_step(&data.batch(), &hyper).unwrap();
            if let Some((told, before)) = under_way.replace((told, step)) {
                assert_eq!(all.finish_step(before).unwrap(), told);
            }
        }
        let (told, step) = under_way.unwrap();
        assert_eq!(all.finish_step(step).unwrap(), told);
        assert!(
            all.state().unwrap() == one.state().unwrap(),
            "{precision}: parameters"
        );
        // Every rank has the same parameters, so whoever scores an image scores it alike.
        for images in [1, images - 1, 2 * images + 3] {
            let data = Data::new(r, &graph, images);
            let seen = all.predict(data.batch().pixels).unwrap();
            assert!(seen == one.predict(data.batch().pixels).unwrap());
            let (seen, told) = (
                all.eval_step(&data.batch()).unwrap(),
                one.eval_step(&data.batch()).unwrap(),
            );
            assert_eq!((seen.images, seen.top1), (told.images, told.top1));
            assert!((seen.loss() - told.loss()).abs() < 1e-12 * told.loss());
        }
        // Averages are exchanged on all, and back.
        let trained = all.state().unwrap();
        all.swap_average().unwrap();
        one.swap_average().unwrap();
        assert_eq!(
            all.eval_step(&data[0].batch()).unwrap().top1,
            one.eval_step(&data[0].batch()).unwrap().top1
        );
        assert!(all.state().unwrap() == one.state().unwrap() && all.state().unwrap() != trained);
        all.swap_average().unwrap();
        assert!(all.state().unwrap() == trained);
        // What is refused changes nothing.
        assert!(all.load(&State::new()).is_err());
        // From a state, with twice as many micro-batches: the sum has another order.
        all.load(&trained).unwrap();
        one.load(&trained).unwrap();
        let data = Data::new(r, &graph, 2 * images);
        let told = one.train_step(&data.batch(), &hyper).unwrap();
        let seen = all.train_step(&data.batch(), &hyper).unwrap();
        assert_eq!((seen.images, seen.top1), (told.images, told.top1));
        assert!(worst(&all.state().unwrap(), &one.state().unwrap()).0 < 1e-5);
        // What cannot be dealt is refused before anything is begun.
        if ranks > 1 {
            let odd = Data::new(r, &graph, micro_batch);
            let error = all
                .train_step(&odd.batch(), &hyper)
                .unwrap_err()
                .to_string();
            assert!(error.contains("cannot be dealt to"), "{error}");
        }
    }
}

/// Every rule, and what a step may ask for besides, as the oracle.
#[test]
fn cuda_rules() {
    if !has_card() {
        return;
    }
    let graph = network(Plane { h: 32, w: 48, c: 3 }, 1, 10);
    let r = &mut Random::new(3);
    let data = Data::new(r, &graph, 16);
    let mut state = initial_state(&graph, 1);
    for (name, tensor) in state.clone() {
        state.insert(format!("{AVERAGE_PREFIX}{name}"), tensor);
    }
    let slow = Hyper {
        nesterov: false,
        average: Some(0.8),
        ..hyper()
    };
    for hyper in [
        Hyper {
            rule: Rule::Lars2018 { trust: 0.1 },
            clip_norm: Some(0.5),
            ..slow
        },
        Hyper {
            rule: Rule::Lars { trust: 0.1 },
            ..slow
        },
    ] {
        let options = Options {
            average: true,
            ..options(8, Precision::F32)
        };
        let mut ours = Cuda::new(&graph, &options, &state, cache()).unwrap();
        let mut truth = Oracle::new(&graph, 8, &state).unwrap();
        for _ in 0..2 {
            ours.train_step(&data.batch(), &hyper).unwrap();
            truth.train_step(&data.batch(), &hyper).unwrap();
        }
        let (error, name) = worst(&ours.state().unwrap(), &truth.state().unwrap());
        assert!(error < 2e-4, "{:?}: {name}: {error}", hyper.rule);
    }
}

/// The card as cuDNN describes it; src/cuda/h100.json is one such description.
#[test]
fn cuda_card_is_described() {
    if !has_card() {
        return;
    }
    let graph = network(Plane { h: 32, w: 32, c: 3 }, 1, 10);
    let ours = engine(&graph, 8, Precision::Bf16, &initial_state(&graph, 0));
    let json = ours.describe_card().unwrap();
    println!("{json}");
    let value: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(value.is_object());
}

/// What a card has trained, the CPU scores alike.
#[test]
fn cuda_states_are_the_cpus() {
    if !has_card() {
        return;
    }
    let (graph, images) = match is_made_up() {
        true => (nn::resnet(18, 32, 10, nn::Recipe::Torchvision).unwrap(), 8),
        false => (nn::resnet(50, 64, 10, nn::Recipe::Torchvision).unwrap(), 32),
    };
    let r = &mut Random::new(7);
    let data = Data::new(r, &graph, images);
    let state = initial_state(&graph, 2);
    let mut hyper = hyper();
    hyper.lr = 0.01;
    let mut ours = engine(&graph, images, Precision::F32, &state);
    for _ in 0..if is_made_up() { 1 } else { 5 } {
        ours.train_step(&data.batch(), &hyper).unwrap();
    }
    let options = cpu::Options::new(images, 2);
    let mut cpu = Cpu::new(&graph, &options, &ours.state().unwrap()).unwrap();
    let (a, b) = (
        ours.eval_step(&data.batch()).unwrap(),
        cpu.eval_step(&data.batch()).unwrap(),
    );
    assert_eq!((a.top1, a.top5), (b.top1, b.top5));
    assert!(
        (a.loss() - b.loss()).abs() < 1e-4 * b.loss(),
        "{a:?}, {b:?}"
    );
}

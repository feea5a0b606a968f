//! Cards: none is needed to start, and several are one engine. Those here are made up
//! (crates/engine/tests/card): driver, NVRTC, cuDNN and NCCL as libraries that compute on the host.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Home, runner, text};

/// What the program asks the dynamic linker for has nothing of NVIDIA's: it is looked for when it is needed.
#[test]
fn the_program_links_no_cuda_library() {
    let Ok(output) = Command::new("ldd")
        .arg(env!("CARGO_BIN_EXE_runner"))
        .output()
    else {
        eprintln!("skipped: there is no ldd");
        return;
    };
    let libraries = text(&output.stdout);
    assert!(libraries.contains("libc.so"), "{libraries}");
    for name in ["cuda", "cudnn", "nvrtc", "cublas", "nccl", "nvidia"] {
        assert!(!libraries.contains(name), "{libraries}");
    }
}

/// Libraries of two cards in `folder`; none without a C++ compiler, or where there is a card.
fn make_cards(folder: &Path) -> Option<()> {
    if engine::cuda::libraries().driver.is_some() {
        eprintln!("skipped: there is a CUDA driver");
        return None;
    }
    let engine = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine");
    let compile = |source: &str, out: &str, define: &str| {
        Command::new("c++")
            .args(["-O2", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off"])
            .args([define, "-o"])
            .args([folder.join(out), engine.join(source)])
            .arg("-ldl")
            .status()
    };
    let Ok(status) = compile("tests/card/card.cpp", "libcuda.so", "-DCARD") else {
        eprintln!("skipped: there is no C++ compiler (c++)");
        return None;
    };
    assert!(status.success(), "the compiler refuses card.cpp");
    let status = compile("src/cuda/shim.cpp", "shim0.so", "-DELEMENT=0");
    assert!(status.unwrap().success(), "the compiler refuses kernels.cu");
    // The made-up cuDNN has its roundings from this one.
    let status = compile("src/cuda/shim.cpp", "shim1.so", "-DELEMENT=1");
    assert!(status.unwrap().success(), "the compiler refuses kernels.cu");
    for name in ["libnvrtc.so", "libcudnn.so", "libnccl.so.2"] {
        std::os::unix::fs::symlink("libcuda.so", folder.join(name)).unwrap();
    }
    Some(())
}

/// The program where there are two cards, by `args`: exit code and everything that it says.
fn with_cards(folder: &Path, args: &[&str]) -> (i32, String) {
    let output = runner(args)
        .env("LD_LIBRARY_PATH", folder)
        .env("XDG_CACHE_HOME", folder)
        .env("MADE_UP_CARDS", "2")
        .output()
        .unwrap();
    let said = format!("{}{}", text(&output.stdout), text(&output.stderr));
    (output.status.code().unwrap(), said)
}

/// Bytes of the tensors of a run's last checkpoint.
fn tensors(run: &Path) -> Vec<u8> {
    let file: PathBuf = run.join("checkpoints/step-0000000002.safetensors");
    let bytes = std::fs::read(file).unwrap();
    let (header, rest) = bytes.split_first_chunk().unwrap();
    rest[u64::from_le_bytes(*header) as usize..].to_vec()
}

/// Two cards are found, planned for and trained on, to the bits of one card that sees as many micro-batches.
#[test]
fn two_cards_train_as_one_does() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    if make_cards(folder).is_none() {
        return;
    }
    let (_, said) = with_cards(folder, &["doctor"]);
    for line in [
        "card         cuda:1: made-up card, 8 GiB, compute capability 9.0",
        "cudnn        9.19.0",
        "nccl         2.28.9",
    ] {
        assert!(said.contains(line), "{said}");
    }
    let sets = [
        "mode=train",
        "train.batch_size=4",
        "train.bn_batch=2",
        "train.length=2 steps",
        "schedule.warmup=1 steps",
    ];
    let train = |device: &str| {
        let home = Home::new();
        let device = format!("train.device={device}");
        let mut all = sets.to_vec();
        all.push(&device);
        let args = home.args(&all);
        let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
        let (code, said) = with_cards(folder, &args);
        (home, code, said)
    };
    let (together, code, said) = train("cuda:all");
    assert_eq!(code, 0, "{said}");
    let device = "cuda:0 to 1: 2 x made-up card, f32, cuDNN 9.19.0, NCCL 2.28.9";
    assert!(said.contains(device), "{said}");
    let (alone, code, said) = train("cuda");
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("cuda:0: made-up card, f32, cuDNN"), "{said}");
    assert!(tensors(&together.path()) == tensors(&alone.path()));

    let (_, code, said) = train("cuda:0,2");
    assert_eq!(code, 4, "{said}");
    let why = "train.device: cuda:2: the cards are cuda:0 to cuda:1\n";
    assert!(said.contains(why), "{said}");
    let home = Home::new();
    let args = home.args(&[
        "train.device=cuda:all",
        "train.batch_size=9",
        "train.bn_batch=3",
    ]);
    let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
    let (code, said) = with_cards(folder, &args);
    assert_eq!(code, 2, "{said}");
    let why = "train.device: 2 cards cannot share train.batch_size = 9 in micro-batches of train.bn_batch = 3";
    assert!(said.contains(why), "{said}");
    let args = [
        "plan",
        "configs/resnet50.toml",
        "--set",
        "train.device=cuda:all",
    ];
    let (code, said) = with_cards(folder, &args);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("each of 2 cards"), "{said}");
}

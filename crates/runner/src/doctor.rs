//! `runner doctor`: what this machine has, and what is missing.

use std::process::{Command, ExitCode};

use serde::Serialize;

use crate::cli::DoctorArgs;
use crate::failure::Failure;
use crate::output;

/// What there is, by name; absent things are null.
#[derive(Serialize)]
struct Report {
    version: &'static str,
    system: String,
    cpu: Option<String>,
    cores: usize,
    /// Vector instructions of the CPU, of those that matter here.
    vector: Vec<&'static str>,
    /// The level of vector instructions that the engine uses here.
    level: String,
    memory_bytes: Option<u64>,
    memory_available_bytes: Option<u64>,
    nvidia_driver: Option<String>,
    /// The newest CUDA that the driver knows.
    cuda: Option<String>,
    nvrtc: Option<String>,
    cudnn: Option<String>,
    cards: Vec<String>,
    /// Why the CUDA engine cannot be used, and what to do.
    nccl: Option<String>,
    cuda_lacks: Option<String>,
    git: Option<String>,
    mlflow: Option<String>,
    tensorboard: Option<String>,
}

/// `runner doctor`.
pub(crate) fn doctor(args: &DoctorArgs) -> Result<ExitCode, Failure> {
    let report = Report::new();
    output::print(&match args.json {
        true => serde_json::to_string_pretty(&report).expect("a report has string keys") + "\n",
        false => report.text(),
    });
    Ok(ExitCode::SUCCESS)
}

/// Value of a line `key : value` of a file in /proc.
fn proc_value(file: &str, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Bytes of a line `key : N kB` of a file in /proc.
fn proc_bytes(file: &str, key: &str) -> Option<u64> {
    let value = proc_value(file, key)?;
    let kib: u64 = value.strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// Memory that a new process can have, bytes; none where the system does not say. A container's limit counts too.
pub(crate) fn memory_available() -> Option<u64> {
    let number = |file: &str| -> Option<u64> {
        let text = std::fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok()?;
        text.trim().parse().ok() // "max" where there is no limit
    };
    let left = number("memory.max")
        .map(|limit| limit.saturating_sub(number("memory.current").unwrap_or(0)));
    let free = proc_bytes("/proc/meminfo", "MemAvailable");
    free.into_iter().chain(left).min()
}

/// The most memory that this process has had in use, bytes; none where the system does not say.
pub(crate) fn peak_resident() -> Option<u64> {
    proc_bytes("/proc/self/status", "VmHWM")
}

/// The first line that a command prints, if it is there and succeeds.
fn first_line(command: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(command)
        .args(args)
        .output()
        .ok()
        .filter(|o| o.status.success())?;
    Some(
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .next()?
            .trim()
            .to_owned(),
    )
}

fn vector_instructions() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        let all = [
            ("avx2", std::arch::is_x86_feature_detected!("avx2")),
            ("fma", std::arch::is_x86_feature_detected!("fma")),
            ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
            (
                "avx512bf16",
                std::arch::is_x86_feature_detected!("avx512bf16"),
            ),
        ];
        all.into_iter()
            .filter(|(_, is_there)| *is_there)
            .map(|(name, _)| name)
            .collect()
    }
    #[cfg(not(target_arch = "x86_64"))]
    vec![]
}

impl Report {
    fn new() -> Self {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let libraries = engine::cuda::libraries();
        let cards = match libraries.driver {
            Some(_) => engine::cuda::cards().unwrap_or_default(),
            None => vec![],
        };
        let (os, arch) = (std::env::consts::OS, std::env::consts::ARCH);
        Self {
            version: env!("CARGO_PKG_VERSION"),
            system: format!("{os} {} {arch}", kernel.trim()),
            cpu: proc_value("/proc/cpuinfo", "model name"),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            vector: vector_instructions(),
            level: engine::cpu::Level::detect().to_string(),
            memory_bytes: proc_bytes("/proc/meminfo", "MemTotal"),
            memory_available_bytes: memory_available(),
            nvidia_driver: proc_value("/proc/driver/nvidia/version", "NVRM version"),
            cuda: libraries
                .driver
                .map(|v| format!("{}.{}", v / 1000, v % 1000 / 10)),
            nvrtc: libraries
                .nvrtc
                .map(|(major, minor)| format!("{major}.{minor}")),
            cudnn: libraries.cudnn.map(engine::cuda::cudnn_version),
            nccl: libraries.nccl.map(engine::cuda::nccl_version),
            cuda_lacks: engine::cuda::probe(0).err().map(|e| e.to_string()),
            cards: cards.iter().map(ToString::to_string).collect(),
            git: first_line("git", &["--version"]),
            mlflow: first_line("mlflow", &["--version"]),
            tensorboard: first_line("tensorboard", &["--version"]),
        }
    }

    fn text(&self) -> String {
        let gib = |bytes: Option<u64>| {
            bytes.map_or("?".into(), |b| {
                format!("{:.1} GiB", b as f64 / f64::from(1 << 30))
            })
        };
        let or =
            |value: &Option<String>, absent: &str| value.clone().unwrap_or_else(|| absent.into());
        let vector = match &self.vector[..] {
            [] => "none that the engine knows".into(),
            names => names.join(" "),
        };
        let driver = match (&self.cuda, &self.nvidia_driver) {
            (Some(cuda), Some(driver)) => format!("CUDA {cuda} by {driver}"),
            (Some(cuda), None) => format!("CUDA {cuda}"),
            (None, _) => "no driver (libcuda.so.1): runs use the CPU".into(),
        };
        let mut gpu = vec![format!("gpu          {driver}")];
        if self.cuda.is_some() {
            gpu.extend(self.cards.iter().map(|card| format!("card         {card}")));
            let without = "missing: without it runs use the CPU";
            gpu.push(format!("nvrtc        {}", or(&self.nvrtc, without)));
            let own = "missing: without it convolutions are our own, which take longer";
            gpu.push(format!("cudnn        {}", or(&self.cudnn, own)));
            let one = "missing: without it runs use one card";
            gpu.push(format!("nccl         {}", or(&self.nccl, one)));
            gpu.extend(
                self.cuda_lacks
                    .iter()
                    .map(|lacks| format!("cuda engine  cannot be used: {lacks}")),
            );
        }
        [
            format!("runner       {}", self.version),
            format!("system       {}", self.system),
            format!("cpu          {}, {} cores", or(&self.cpu, "unknown"), self.cores),
            format!("vector       {vector}"),
            format!("engine       cpu at level {}", self.level),
            format!("memory       {}, {} available", gib(self.memory_bytes), gib(self.memory_available_bytes)),
            gpu.join("\n"),
            format!("git          {}", or(&self.git, "missing: runs are tracked without the commit")),
            format!("mlflow       {}", or(&self.mlflow, "not on the path: needed only to look at mlflow.db (`pip install mlflow`)")),
            format!("tensorboard  {}", or(&self.tensorboard, "not on the path: needed only to look at event files (`pip install tensorboard`)")),
        ]
        .join("\n")
            + "\n"
    }
}

//! How busy the machine is, every 10 s, under the names that MLflow's own monitor uses.
//!
//! A thread measures; what it finds goes the way of all numbers. NVIDIA's GPUs are asked by one `nvidia-smi` that
//! repeats itself, where there is one.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use sysinfo::{Disks, Networks, System};

use crate::metrics::Scalar;
use crate::milliseconds;

/// Between two samples, as in MLflow.
const PACE: Duration = Duration::from_secs(10);
/// A CPU's load is a difference: this long passes before the first sample.
const FIRST: Duration = Duration::from_millis(500);

/// When, in milliseconds since 1970, and what.
type Sample = (i64, Vec<Scalar>);

/// The thread that measures, until this is dropped.
pub(crate) struct Sampler {
    samples: Receiver<Sample>,
    _stop: Sender<()>,
}

impl Sampler {
    pub(crate) fn start() -> io::Result<Self> {
        let mut machine = Machine::new().map_err(io::Error::other)?;
        let (sender, samples) = mpsc::channel();
        let (stop, stopped) = mpsc::channel::<()>();
        thread::Builder::new()
            .name("system".into())
            .spawn(move || {
                let mut wait = FIRST;
                while stopped.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                    if sender.send((milliseconds(), machine.sample())).is_err() {
                        return;
                    }
                    wait = PACE;
                }
            })?;
        Ok(Self {
            samples,
            _stop: stop,
        })
    }

    /// What was measured since the last time.
    pub(crate) fn samples(&self) -> impl Iterator<Item = Sample> {
        self.samples.try_iter()
    }
}

struct Machine {
    system: System,
    disks: Disks,
    networks: Networks,
    /// Received and sent so far, when this began.
    before: (u64, u64),
    gpus: Option<Gpus>,
}

impl Machine {
    fn new() -> Result<Self, sysinfo::Error> {
        let mut system = System::new()?;
        system.refresh_cpu_usage();
        let networks = Networks::new_with_refreshed_list()?;
        Ok(Self {
            system,
            disks: Disks::new_with_refreshed_list()?,
            before: traffic(&networks),
            networks,
            gpus: Gpus::start("nvidia-smi").ok(),
        })
    }

    fn sample(&mut self) -> Vec<Scalar> {
        self.system.refresh_cpu_usage();
        self.system.refresh_memory();
        self.networks.refresh(true);
        self.disks.refresh(false);
        let megabytes = |bytes: u64| bytes as f64 / 1e6;
        let percent = |part: u64, whole: u64| match whole {
            0 => 0.0,
            whole => 100.0 * part as f64 / whole as f64,
        };
        let (total, available) = (self.system.total_memory(), self.system.available_memory());
        let used = total.saturating_sub(available);
        let (received, sent) = traffic(&self.networks);
        let mut scalars: Vec<Scalar> = vec![
            (
                "system/cpu_utilization_percentage".into(),
                f64::from(self.system.global_cpu_usage()),
            ),
            (
                "system/system_memory_usage_megabytes".into(),
                megabytes(used),
            ),
            (
                "system/system_memory_usage_percentage".into(),
                percent(used, total),
            ),
            (
                "system/network_receive_megabytes".into(),
                megabytes(received.saturating_sub(self.before.0)),
            ),
            (
                "system/network_transmit_megabytes".into(),
                megabytes(sent.saturating_sub(self.before.1)),
            ),
        ];
        let mut disks = self.disks.iter();
        if let Some(disk) = disks.find(|disk| disk.mount_point() == Path::new("/")) {
            let (total, available) = (disk.total_space(), disk.available_space());
            let used = total.saturating_sub(available);
            scalars.extend([
                ("system/disk_usage_percentage".into(), percent(used, total)),
                ("system/disk_usage_megabytes".into(), megabytes(used)),
                (
                    "system/disk_available_megabytes".into(),
                    megabytes(available),
                ),
            ]);
        }
        scalars.extend(self.gpus.iter().flat_map(Gpus::sample));
        scalars
    }
}

/// Bytes received and sent since the machine started, over all networks but the loopback.
fn traffic(networks: &Networks) -> (u64, u64) {
    let outside = networks
        .iter()
        .filter(|(name, _)| name.to_str() != Some("lo"));
    outside.fold((0, 0), |(received, sent), (_, data)| {
        (
            received + data.total_received(),
            sent + data.total_transmitted(),
        )
    })
}

/// A running `nvidia-smi`, and what it said last of each GPU.
struct Gpus {
    child: Child,
    last: Arc<Mutex<BTreeMap<u32, Gpu>>>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Gpu {
    /// In percent.
    utilization: f64,
    /// In MiB, used and all.
    memory: (f64, f64),
    watts: Option<f64>,
}

impl Gpus {
    fn start(program: &str) -> io::Result<Self> {
        let query = "--query-gpu=index,utilization.gpu,memory.used,memory.total,power.draw";
        let mut command = Command::new(program);
        command.args([query, "--format=csv,noheader,nounits", "--loop=10"]);
        command.stdin(Stdio::null()).stderr(Stdio::null());
        let mut child = command.stdout(Stdio::piped()).spawn()?;
        let output = child.stdout.take().expect("it is piped");
        let last = Arc::new(Mutex::new(BTreeMap::new()));
        let told = Arc::clone(&last);
        thread::Builder::new().name("gpus".into()).spawn(move || {
            let told = || told.lock().unwrap_or_else(PoisonError::into_inner);
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if let Some((index, gpu)) = gpu(&line) {
                    told().insert(index, gpu);
                }
            }
            // It has ended, and what it said last is no longer so.
            told().clear();
        })?;
        Ok(Self { child, last })
    }

    fn sample(&self) -> Vec<Scalar> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.iter().flat_map(|(i, gpu)| gpu.scalars(*i)).collect()
    }
}

impl Drop for Gpus {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Gpu {
    fn scalars(&self, index: u32) -> Vec<Scalar> {
        let (used, total) = self.memory;
        let name = |what: &str| format!("system/gpu_{index}_{what}").into();
        let mut scalars = vec![
            (name("utilization_percentage"), self.utilization),
            (
                name("memory_usage_percentage"),
                if total > 0.0 {
                    100.0 * used / total
                } else {
                    0.0
                },
            ),
            (name("memory_usage_megabytes"), used * 1.048_576),
        ];
        scalars.extend(self.watts.map(|watts| (name("power_usage_watts"), watts)));
        scalars
    }
}

/// A line of `nvidia-smi`: `0, 97, 30123, 81559, 612.34`; what a GPU does not know is `[N/A]`.
fn gpu(line: &str) -> Option<(u32, Gpu)> {
    let mut fields = line.split(',').map(str::trim);
    let index = fields.next()?.parse().ok()?;
    let mut number = || fields.next()?.parse::<f64>().ok();
    let utilization = number()?;
    let memory = (number()?, number()?);
    let watts = number();
    let gpu = Gpu {
        utilization,
        memory,
        watts,
    };
    Some((index, gpu))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_nvidia_smi() {
        let h100 = Gpu {
            utilization: 97.0,
            memory: (40_000.0, 80_000.0),
            watts: Some(612.34),
        };
        assert_eq!(gpu("1, 97, 40000, 80000, 612.34"), Some((1, h100)));
        let silent = Gpu {
            watts: None,
            ..h100
        };
        assert_eq!(gpu("0, 97, 40000, 80000, [N/A]"), Some((0, silent)));
        assert_eq!(gpu("No devices were found"), None);
        assert_eq!(gpu(""), None);
        let scalars = h100.scalars(1);
        assert_eq!(
            scalars,
            [
                ("system/gpu_1_utilization_percentage".into(), 97.0),
                ("system/gpu_1_memory_usage_percentage".into(), 50.0),
                ("system/gpu_1_memory_usage_megabytes".into(), 41_943.04),
                ("system/gpu_1_power_usage_watts".into(), 612.34),
            ]
        );
    }

    #[test]
    fn a_machine_is_measured() {
        let mut machine = Machine::new().unwrap();
        let scalars: BTreeMap<_, _> = machine.sample().into_iter().collect();
        let value = |name: &str| scalars[format!("system/{name}").as_str()];
        assert!((0.0..=100.0).contains(&value("cpu_utilization_percentage")));
        assert!((0.0..=100.0).contains(&value("system_memory_usage_percentage")));
        assert!(value("system_memory_usage_megabytes") > 10.0);
        assert!(value("network_receive_megabytes") >= 0.0);
        assert!(value("network_transmit_megabytes") >= 0.0);
    }

    /// A program of that name that says what `nvidia-smi` says.
    #[cfg(unix)]
    #[test]
    fn gpus_are_asked_by_a_program() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("smi");
        let script = "#!/bin/sh\necho \"$*\" >\"$0.args\"\necho '0, 10, 1, 4, 70.5'\necho '1, 20, 2, 4, 80.5'\nsleep 60\n";
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        // While another test starts a program, the script may still be open for writing in it.
        let gpus = loop {
            match Gpus::start(path.to_str().unwrap()) {
                Err(e) if e.kind() == io::ErrorKind::ExecutableFileBusy => thread::yield_now(),
                started => break started.unwrap(),
            }
        };
        while gpus.sample().len() < 8 {
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(gpus.sample()[4].1, 20.0);
        let args = std::fs::read_to_string(dir.path().join("smi.args")).unwrap();
        assert!(
            args.contains("--format=csv,noheader,nounits --loop=10"),
            "{args}"
        );
        assert!(Gpus::start("/nowhere/nvidia-smi").is_err());
    }
}

//! Weights of other programs: `model.weights`, `runner import` and `runner export`.
//!
//! Read are safetensors and what `torch.save` writes for a state dict; names are torchvision's (timm's ResNets have the
//! same) or those of the 2018 TPU reference's checkpoints.

mod pth;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use engine::{MOMENTUM_PREFIX, State, Tensor};
use graph::Graph;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use spec::Run;
use train::{Meta, Progress};

use crate::cli::{ExportArgs, ImportArgs};
use crate::failure::Failure;
use crate::{config, evaluate, network, output};

/// A format of numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    F32,
    F64,
    F16,
    Bf16,
    /// Counters: of no use here.
    I64,
}

/// Little-endian numbers as f32, rounded where they are f64.
fn floats(format: Format, bytes: &[u8]) -> Vec<f32> {
    fn each<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        let (chunks, _) = bytes.as_chunks::<N>();
        chunks.iter().map(|&chunk| value(chunk)).collect()
    }
    match format {
        Format::F32 => each(bytes, f32::from_le_bytes),
        Format::F64 => each(bytes, |b| f64::from_le_bytes(b) as f32),
        Format::F16 => each(bytes, |b| half::f16::from_le_bytes(b).to_f32()),
        Format::Bf16 => each(bytes, |b| half::bf16::from_le_bytes(b).to_f32()),
        Format::I64 => vec![],
    }
}

/// The tensors of a file, by the names that it gives them.
fn read(path: &Path) -> Result<State, Failure> {
    let bad = |what: String| {
        Failure::Spec(format!(
            "{}: {what}\nhint: give a .safetensors file, or a state dict as torch.save writes it",
            path.display()
        ))
    };
    let file = std::fs::read(path).map_err(|e| bad(format!("cannot read: {e}")))?;
    if file.starts_with(b"PK\x03\x04") {
        return pth::read(&file).map_err(bad);
    }
    let tensors = SafeTensors::deserialize(&file)
        .map_err(|e| bad(format!("neither safetensors nor a file of torch.save: {e}")))?;
    let mut state = State::new();
    for (name, view) in tensors.tensors() {
        let format = match view.dtype() {
            Dtype::F32 => Format::F32,
            Dtype::F64 => Format::F64,
            Dtype::F16 => Format::F16,
            Dtype::BF16 => Format::Bf16,
            Dtype::I64 => continue,
            other => {
                return Err(bad(format!(
                    "tensor {name} is {other:?}, not of floating point"
                )));
            }
        };
        let (shape, values) = (view.shape().to_vec(), floats(format, view.data()));
        state.insert(name, Tensor { shape, values });
    }
    Ok(state)
}

/// The initial state of a run: what `model.weights` names, or what the seed draws. Also what should be said about it.
pub(crate) fn initial(run: &Run, graph: &Graph) -> Result<(State, Vec<String>), Failure> {
    let drawn = engine::initial_state(graph, run.seed);
    match &run.model.weights {
        None => Ok((drawn, vec![])),
        Some(path) => fit(path.as_ref(), drawn),
    }
}

/// The tensors of a file in the network whose initial state is `drawn`. A classifier of another number of classes keeps
/// its initial values; everything else has to be there in the right shape.
fn fit(path: &Path, drawn: State) -> Result<(State, Vec<String>), Failure> {
    let found = renamed(read(path)?, &drawn);
    let bad = |what: String| {
        Failure::Spec(format!(
            "{}: {what}\nhint: model.depth, model.classes and model.recipe have to be those of the weights",
            path.display()
        ))
    };
    let mut notes = vec![];
    let mut state = State::new();
    let is_head = |name: &str| name == "fc.weight" || name == "fc.bias";
    let head_differs = found.get("fc.weight").is_some_and(|t| {
        t.shape.get(1) == drawn["fc.weight"].shape.get(1) && t.shape != drawn["fc.weight"].shape
    });
    if head_differs {
        let (there, here) = (found["fc.weight"].shape[0], drawn["fc.weight"].shape[0]);
        notes.push(format!(
            "{}: its classifier has {there} classes; the one of {here} starts anew",
            path.display()
        ));
    }
    for (name, initial) in &drawn {
        if name.starts_with(MOMENTUM_PREFIX) {
            continue;
        }
        if head_differs && is_head(name) {
            state.insert(name.clone(), initial.clone());
            continue;
        }
        let Some(tensor) = found.get(name) else {
            return Err(bad(format!("tensor {name} is missing")));
        };
        if tensor.shape != initial.shape {
            let (there, here) = (&tensor.shape, &initial.shape);
            return Err(bad(format!(
                "tensor {name} has shape {there:?}, the network has {here:?}"
            )));
        }
        if !tensor.values.iter().all(|value| value.is_finite()) {
            return Err(bad(format!("tensor {name} is not finite")));
        }
        state.insert(name.clone(), tensor.clone());
    }
    if let Some(name) = found.keys().find(|name| !drawn.contains_key(*name)) {
        return Err(bad(format!("tensor {name} does not belong to the network")));
    }
    Ok((state, notes))
}

/// The tensors under torchvision's names, without those that belong to no network: optimizers', averages', counters.
fn renamed(found: State, drawn: &State) -> State {
    let found = if found.contains_key("conv2d/kernel") {
        from_reference(found, drawn)
    } else {
        found
    };
    let is_of_network = |name: &str| {
        let others = ["optimizer.", "ema."];
        !others.iter().any(|prefix| name.starts_with(prefix))
            && !name.ends_with(".num_batches_tracked")
    };
    let plain = |name: String| {
        // What torch's wrappers put in front.
        let name = name.strip_prefix("_orig_mod.").unwrap_or(&name);
        name.strip_prefix("module.").unwrap_or(name).to_owned()
    };
    let found = found.into_iter().map(|(name, t)| (plain(name), t));
    found.filter(|(name, _)| is_of_network(name)).collect()
}

/// From the names and layouts of the reference's checkpoints: convolutions and normalisations are numbered as they were
/// made, in a block the projection first; kernels are H W I O, the classifier's is `[in, out]`.
fn from_reference(mut found: State, drawn: &State) -> State {
    let mut state = State::new();
    let numbered = |kind: &str, i: usize| match i {
        0 => kind.to_owned(),
        i => format!("{kind}_{i}"),
    };
    for (i, conv) in in_order_of_making(drawn).iter().enumerate() {
        let norm = norm_of(conv);
        let (kernel, of_norm) = (numbered("conv2d", i), numbered("batch_normalization", i));
        if let Some(t) = found.remove(&format!("{kernel}/kernel")) {
            state.insert(format!("{conv}.weight"), permuted(&t, &[3, 2, 0, 1]));
        }
        for (theirs, ours) in [
            ("gamma", "weight"),
            ("beta", "bias"),
            ("moving_mean", "running_mean"),
            ("moving_variance", "running_var"),
        ] {
            if let Some(t) = found.remove(&format!("{of_norm}/{theirs}")) {
                state.insert(format!("{norm}.{ours}"), t);
            }
        }
    }
    if let Some(t) = found.remove("dense/kernel") {
        state.insert("fc.weight".into(), permuted(&t, &[1, 0]));
    }
    if let Some(t) = found.remove("dense/bias") {
        state.insert("fc.bias".into(), t);
    }
    let is_slot = |name: &str| {
        name == "global_step"
            || ["/Momentum", "/ExponentialMovingAverage"]
                .iter()
                .any(|s| name.ends_with(s))
    };
    found.retain(|name, _| !is_slot(name));
    state.extend(found);
    state
}

/// Names of the convolutions in the order in which the reference makes them.
fn in_order_of_making(drawn: &State) -> Vec<String> {
    let convs = drawn
        .iter()
        .filter(|(name, t)| t.shape.len() == 4 && !name.starts_with(MOMENTUM_PREFIX));
    let mut convs: Vec<String> = convs
        .map(|(name, _)| name.trim_end_matches(".weight").to_owned())
        .collect();
    // layer2.10.conv1 comes after layer2.9.conv1, and the projection before both of its block.
    convs.sort_by_cached_key(|name| {
        let parts: Vec<&str> = name.split('.').collect();
        let number = |i: usize| {
            parts
                .get(i)
                .and_then(|p| p.parse::<usize>().ok())
                .unwrap_or(0)
        };
        let stage = parts[0]
            .strip_prefix("layer")
            .and_then(|n| n.parse::<usize>().ok());
        let last = parts.get(2).copied().unwrap_or_default();
        (
            stage.unwrap_or(0),
            number(1),
            last != "downsample",
            name.clone(),
        )
    });
    convs
}

/// The normalisation that follows a convolution.
fn norm_of(conv: &str) -> String {
    match conv.strip_suffix("downsample.0") {
        Some(block) => format!("{block}downsample.1"),
        None => conv.replace("conv", "bn"),
    }
}

/// A tensor whose axis i is axis `axes[i]` of `t`; unchanged where it has another number of axes.
fn permuted(t: &Tensor, axes: &[usize]) -> Tensor {
    if t.shape.len() != axes.len() {
        return t.clone();
    }
    let shape: Vec<usize> = axes.iter().map(|&axis| t.shape[axis]).collect();
    let stride = |axis: usize| t.shape[axis + 1..].iter().product::<usize>();
    let strides: Vec<usize> = axes.iter().map(|&axis| stride(axis)).collect();
    let value = |mut index: usize| {
        let mut at = 0;
        for (size, stride) in shape.iter().zip(&strides).rev() {
            at += index % size * stride;
            index /= size;
        }
        t.values[at]
    };
    let values = (0..t.values.len()).map(value).collect();
    Tensor { shape, values }
}

/// `runner import`.
pub(crate) fn import(args: &ImportArgs) -> Result<ExitCode, Failure> {
    let run = config::load(&args.spec)?;
    let graph = network::network(&run);
    let labels = network::labels(&run)?;
    let drawn = engine::initial_state(&graph, run.seed);
    let (state, notes) = fit(&args.weights, drawn)?;
    notes.iter().for_each(|note| eprintln!("{note}"));
    let mut meta = Meta::new(&run, run.computation(), labels);
    meta.progress = Progress::default();
    store::write_atomic(&args.out, &[&train::encode(&meta, &state)])?;
    output::print(&format!(
        "{}: {}, {} tensors\n",
        args.out.display(),
        network::title(&run),
        state.len()
    ));
    Ok(ExitCode::SUCCESS)
}

/// `runner export`: a state dict that torch loads strictly into the network of the same depth.
pub(crate) fn export(args: &ExportArgs) -> Result<ExitCode, Failure> {
    // It need not say where the data of the run were.
    let fixed = ["mode=eval", "data.source=fake"];
    let (_, meta, state, run) = evaluate::open(&args.checkpoint, &[], &fixed)?;
    let state = evaluate::to_use(state, &run);
    // torch counts batches in every normalisation.
    let steps = meta.progress.step.to_le_bytes();
    let norms = state
        .keys()
        .filter_map(|name| name.strip_suffix(engine::RUNNING_MEAN));
    let counters: Vec<String> = norms
        .map(|norm| format!("{norm}.num_batches_tracked"))
        .collect();
    let bytes: BTreeMap<&str, Vec<u8>> = state
        .iter()
        .map(|(name, t)| {
            (
                name.as_str(),
                t.values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            )
        })
        .collect();
    let view = |dtype, shape: &[usize], bytes| {
        TensorView::new(dtype, shape.to_vec(), bytes)
            .expect("a tensor has as many values as its shape says")
    };
    let tensors = state.iter().map(|(name, t)| {
        (
            name.as_str(),
            view(Dtype::F32, &t.shape, &bytes[name.as_str()]),
        )
    });
    let counters = counters
        .iter()
        .map(|name| (name.as_str(), view(Dtype::I64, &[], &steps[..])));
    // The key by which torch's readers know whose layout it is.
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let file = safetensors::serialize(tensors.chain(counters), Some(metadata))
        .expect("names are unique and sizes fit");
    store::write_atomic(&args.out, &[&file])?;
    output::print(&format!(
        "{}: {} tensors of step {}\n",
        args.out.display(),
        state.len(),
        meta.progress.step
    ));
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_numbers_convolutions_as_it_makes_them() {
        let graph = nn::resnet(50, 64, 10, nn::Recipe::Tpu2018).unwrap();
        let order = in_order_of_making(&engine::initial_state(&graph, 0));
        assert_eq!(order.len(), 53);
        let first = [
            "conv1",
            "layer1.0.downsample.0",
            "layer1.0.conv1",
            "layer1.0.conv2",
            "layer1.0.conv3",
            "layer1.1.conv1",
        ];
        assert_eq!(order[..6], first);
        assert_eq!(order[52], "layer4.2.conv3");
    }

    /// Our own values under the reference's names and in its layout come back as they were.
    #[test]
    fn the_references_names_and_layouts_are_undone() {
        let graph = nn::resnet(18, 32, 3, nn::Recipe::Tpu2018).unwrap();
        let ours = engine::initial_state(&graph, 1);
        let ours: State = ours
            .into_iter()
            .filter(|(n, _)| !n.starts_with(MOMENTUM_PREFIX))
            .collect();
        let mut theirs = State::new();
        for (i, conv) in in_order_of_making(&ours).iter().enumerate() {
            let suffix = if i == 0 {
                String::new()
            } else {
                format!("_{i}")
            };
            let w = &ours[&format!("{conv}.weight")];
            let (o, c, k) = (w.shape[0], w.shape[1], w.shape[2]);
            let mut hwio = vec![0.0; w.values.len()];
            for (at, value) in w.values.iter().enumerate() {
                let (x, y, i, out) = (at % k, at / k % k, at / (k * k) % c, at / (k * k * c));
                hwio[((y * k + x) * c + i) * o + out] = *value;
            }
            let kernel = Tensor {
                shape: vec![k, k, c, o],
                values: hwio,
            };
            theirs.insert(format!("conv2d{suffix}/kernel"), kernel);
            theirs.insert(format!("conv2d{suffix}/kernel/Momentum"), w.clone());
            for (name, to) in [
                ("weight", "gamma"),
                ("bias", "beta"),
                ("running_mean", "moving_mean"),
                ("running_var", "moving_variance"),
            ] {
                let tensor = ours[&format!("{}.{name}", norm_of(conv))].clone();
                theirs.insert(format!("batch_normalization{suffix}/{to}"), tensor);
            }
        }
        let fc = &ours["fc.weight"];
        let (o, c) = (fc.shape[0], fc.shape[1]);
        let values = (0..o * c)
            .map(|at| fc.values[at % o * c + at / o])
            .collect();
        theirs.insert(
            "dense/kernel".into(),
            Tensor {
                shape: vec![c, o],
                values,
            },
        );
        theirs.insert("dense/bias".into(), ours["fc.bias"].clone());
        theirs.insert(
            "global_step".into(),
            Tensor {
                shape: vec![],
                values: vec![7.0],
            },
        );
        assert_eq!(renamed(theirs, &ours), ours);
    }

    /// Written by tests/goldens/torch_weights.py.
    #[test]
    fn what_torch_saves_is_read() {
        let file = include_bytes!("../tests/goldens/small.pth");
        let found = pth::read(file).unwrap();
        let tensor = |name: &str| (found[name].shape.clone(), found[name].values.clone());
        let base: Vec<f32> = (0..12u8).map(|i| f32::from(i) / 8.0).collect();
        assert_eq!(tensor("module.f32"), (vec![3, 4], base.clone()));
        let transposed = (0..12).map(|i| base[i % 3 * 4 + i / 3]).collect();
        assert_eq!(tensor("transposed"), (vec![4, 3], transposed));
        assert_eq!(tensor("tail"), (vec![7], base[5..].to_vec()));
        assert_eq!(tensor("parameter"), (vec![2], vec![1.5, -2.5]));
        assert_eq!(tensor("f64"), (vec![2], vec![0.1, -0.2]));
        assert_eq!(tensor("f16"), (vec![2], vec![0.5, 65504.0]));
        let bf16 = tensor("bf16").1;
        assert!(bf16[0] == 0.5 && (bf16[1] / 3.0e38 - 1.0).abs() < 1.0 / 256.0);
        assert_eq!(tensor("scalar"), (vec![], vec![7.25]));
        assert_eq!(found.len(), 8, "counters are left out");
        for end in [10, file.len() / 2, file.len() - 1] {
            assert!(pth::read(&file[..end]).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn half_a_pickle_and_foreign_names_are_refused() {
        let said = |file: &[u8]| pth::read(file).unwrap_err();
        assert!(said(b"PK\x03\x04").contains("no directory of a ZIP archive"));
        let zip = |pickle: &[u8]| {
            let (name, n) = (b"a/data.pkl", pickle.len() as u32);
            let sizes = [n.to_le_bytes(), n.to_le_bytes()].concat();
            let local = [
                &b"PK\x03\x04"[..],
                &[0; 14],
                &sizes,
                &[10, 0, 0, 0],
                name,
                pickle,
            ]
            .concat();
            let entry = [
                &b"PK\x01\x02"[..],
                &[0; 16],
                &sizes,
                &[10, 0],
                &[0; 16],
                name,
            ]
            .concat();
            let at = (local.len() as u32).to_le_bytes();
            let end = [
                &b"PK\x05\x06"[..],
                &[0; 4],
                &[1, 0, 1, 0],
                &[0; 4],
                &at,
                &[0; 2],
            ]
            .concat();
            [local, entry, end].concat()
        };
        assert!(said(&zip(b"\x80\x02cos\nsystem\n.")).contains("it asks for os.system"));
        assert!(said(&zip(b"\x80\x02}q\x00")).contains("cut short"));
        assert!(said(&zip(b"\x80\x02K\x01.")).contains("no dictionary"));
        assert!(pth::read(&zip(b"\x80\x02}q\x00.")).unwrap().is_empty());
    }
}

//! The flags of the 2018 TPU reference and its later variants, and what they are called here. docs/FLAGS.md is the
//! same table for readers.

/// What a flag is here.
enum Here {
    /// These keys.
    Keys(&'static [&'static str]),
    /// Nothing, so far.
    NotYet,
    /// Nothing, for good.
    NotNeeded,
}

use Here::{Keys, NotNeeded, NotYet};

/// Name, what it is here, and what there is to know, in half a sentence or not at all.
type Flag = (&'static str, Here, &'static str);

const BIGTABLE: &str =
    "with `data.source = \"bigtable\"`: `bigtable://PROJECT/INSTANCE/TABLE/PREFIX`";
const COLUMN: &str = "`..?column=FAMILY:QUALIFIER`; tfexample:example by default";
const SUBMIT: &str = "runs are started on the machine that computes";
const EXPORT: &str = "checkpoints are safetensors with torchvision's names";
const FILE: &str = "the spec is a file, and `extends` builds it on others";
const SETS: &str = "`--set section.key=value` changes a key";
const LAYOUT: &str = "an engine chooses its own layout";

#[rustfmt::skip] // A table reads better with one row a line.
const FLAGS: &[Flag] = &[
    // The reference version of 2018-09.
    ("use_tpu", Keys(&["train.device"]), "`\"auto\"`, `\"cpu\"`, `\"cuda\"`, `\"cuda:N\"`, `\"cuda:N,M\"` or `\"cuda:all\"`; TPUs are not supported"),
    ("tpu", NotNeeded, SUBMIT),
    ("gcp_project", NotYet, SUBMIT),
    ("tpu_zone", NotYet, SUBMIT),
    ("data_dir", Keys(&["data.train", "data.eval"]), "globs, `\"DIR/train-*\"` and `\"DIR/validation-*\"`; for an empty one, `data.source = \"zeros\"`"),
    ("model_dir", Keys(&["run_dir"]), "`runs/NAME` if absent"),
    ("resnet_depth", Keys(&["model.depth"]), ""),
    ("mode", Keys(&["mode"]), ""),
    ("train_steps", Keys(&["train.length"]), "with a unit, `\"112590 steps\"` or `\"90 epochs\"`, from the start of the run"),
    ("train_batch_size", Keys(&["train.batch_size"]), ""),
    ("eval_batch_size", NotNeeded, "every image is scored once, `train.bn_batch` at a time"),
    ("num_train_images", Keys(&["data.train_examples"]), "compared with the shards"),
    ("num_eval_images", Keys(&["data.eval_examples"]), "compared with the shards"),
    ("num_label_classes", Keys(&["model.classes"]), ""),
    ("steps_per_eval", Keys(&["eval.every"]), "with a unit, `\"1251 steps\"` or `\"1 epoch\"`"),
    ("eval_timeout", Keys(&["eval.wait"]), "in seconds; absent: score the latest checkpoint and stop"),
    ("skip_host_call", NotNeeded, "every step is in metrics.jsonl"),
    ("iterations_per_loop", NotNeeded, "`checkpoint.every` and `eval.every` say when something happens between steps"),
    ("num_parallel_calls", Keys(&["data.lanes"]), "shards read side by side"),
    ("num_cores", Keys(&["train.bn_batch"]), "images normalised together, `train_batch_size` / `num_cores`: 128 of 1024 on 8 cores"),
    ("bigtable_project", Keys(&["data.train", "data.eval"]), BIGTABLE),
    ("bigtable_instance", Keys(&["data.train", "data.eval"]), BIGTABLE),
    ("bigtable_table", Keys(&["data.train", "data.eval"]), BIGTABLE),
    ("bigtable_train_prefix", Keys(&["data.train"]), BIGTABLE),
    ("bigtable_eval_prefix", Keys(&["data.eval"]), BIGTABLE),
    ("bigtable_column_family", Keys(&["data.train", "data.eval"]), COLUMN),
    ("bigtable_column_qualifier", Keys(&["data.train", "data.eval"]), COLUMN),
    ("data_format", NotNeeded, LAYOUT),
    ("transpose_input", NotNeeded, LAYOUT),
    ("export_dir", NotYet, EXPORT),
    ("precision", Keys(&["train.precision"]), "`\"f32\"` or `\"bf16\"`; on CUDA also `\"f16\"` and `\"tf32\"`"),
    ("base_learning_rate", Keys(&["schedule.base_lr"]), "per 256 images, as there"),
    ("momentum", Keys(&["optimizer.momentum"]), ""),
    ("weight_decay", Keys(&["optimizer.weight_decay"]), ""),
    ("label_smoothing", Keys(&["loss.label_smoothing"]), ""),
    ("log_step_count_steps", NotNeeded, "every step is in metrics.jsonl, and the terminal follows the clock"),
    ("enable_lars", Keys(&["optimizer.kind"]), "`\"lars2018\"`, or `\"lars\"` for the reference since 2019, with any batch; with `schedule.kind = \"polynomial\"` and `optimizer.nesterov = false`"),
    ("poly_rate", Keys(&["schedule.base_lr"]), "per 256 images of the batch"),
    // The benchmark's.
    ("data_dir_small", NotYet, "`[progressive]` makes small images of the same shards"),
    ("use_fast_lr", Keys(&["schedule.warmup", "schedule.milestones"]), "4 epochs and 21, 35 and 43 epochs; `[progressive]` has the resolutions"),
    // The parameter file of r1.9.
    ("param_file", NotNeeded, FILE),
    ("param_overrides", NotNeeded, SETS),
    // 2019 and later.
    ("config_file", NotNeeded, FILE),
    ("params_override", NotNeeded, SETS),
    ("eval_master", NotNeeded, "unused there as well"),
    ("eval_after_training", NotNeeded, "a finished run is an evaluated run"),
    ("use_cache", NotNeeded, "the operating system caches the shards"),
    ("image_size", Keys(&["model.resolution"]), ""),
    ("dropblock_groups", Keys(&["model.drop_block_groups"]), "a list: `[3, 4]`"),
    ("dropblock_keep_prob", Keys(&["model.drop_block"]), "1 minus it"),
    ("dropblock_size", Keys(&["model.drop_block_size"]), ""),
    ("pre_activation", NotYet, "blocks are post-activation"),
    ("norm_act_layer", NotYet, "batch normalisation and ReLU"),
    ("profile_every_n_steps", NotYet, "rates and input waits are in metrics.jsonl"),
    ("export_to_tpu", NotNeeded, "there are no TPUs here"),
    ("use_async_checkpointing", NotNeeded, "a thread writes checkpoints, in every mode"),
    ("augment_name", Keys(&["data.augment"]), "`\"autoaugment\"` or `\"randaugment\"`"),
    ("randaug_num_layers", Keys(&["data.augment_ops"]), ""),
    ("randaug_magnitude", Keys(&["data.augment_magnitude"]), ""),
    ("add_warmup_requests", NotYet, EXPORT),
    ("model_name", NotYet, EXPORT),
    ("inference_batch_sizes", NotYet, EXPORT),
    (
        "export_moving_average",
        Keys(&["ema.eval"]),
        "`runner export` writes the average unless it is `\"raw\"`",
    ),
    // Keys of its parameter files that are no flags.
    ("use_resnetd_stem", Keys(&["model.stem"]), "`\"deep\"`"),
    ("resnetd_shortcut", Keys(&["model.shortcut"]), "`\"mean\"`"),
    ("replace_stem_max_pool", Keys(&["model.stem_pool"]), "`\"conv\"`"),
    ("se_ratio", Keys(&["model.se_ratio"]), ""),
    ("drop_connect_rate", Keys(&["model.drop_connect"]), ""),
    ("dropout_rate", Keys(&["model.dropout"]), ""),
    ("moving_average_decay", Keys(&["ema.half_life"]), "ln 2 / -ln d steps: 0.9999 is `\"6931 steps\"`; with `ema.eval = \"average\"`"),
    ("bn_momentum", NotYet, "0.9"),
];

/// What to say to somebody who writes a flag's name as a key.
pub(crate) fn hint(name: &str) -> Option<String> {
    let (_, here, note) = FLAGS.iter().find(|(flag, ..)| *flag == name)?;
    let here = match here {
        Keys(keys) => format!("is {} here", keys.join(" and ")),
        NotYet => "has no key here yet".into(),
        NotNeeded => "is not needed here".into(),
    };
    let note = note.replace('`', "");
    let note = if note.is_empty() {
        note
    } else {
        format!(": {note}")
    };
    Some(format!("the 2018 reference's {name} {here}{note}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse;

    fn row((name, here, note): &Flag) -> String {
        let here = match here {
            Keys(keys) => keys
                .iter()
                .map(|key| format!("`{key}`"))
                .collect::<Vec<_>>(),
            NotYet => vec!["not yet".into()],
            NotNeeded => vec!["not needed".into()],
        };
        format!("| `{name}` | {} | {note} |", here.join(", "))
    }

    #[test]
    fn the_document_has_the_same_rows() {
        let rows: Vec<String> = FLAGS.iter().map(row).collect();
        let document = include_str!("../../../docs/FLAGS.md");
        let written = document.lines().filter(|line| line.starts_with("| `"));
        let written: Vec<&str> = written.collect();
        assert_eq!(
            written,
            rows,
            "docs/FLAGS.md should have these rows:\n{}\n",
            rows.join("\n")
        );
    }

    #[test]
    fn every_key_exists() {
        let run = parse("name = \"x\"\ndata.source = \"fake\"", "x.toml", &[]).unwrap();
        let tree = serde_json::to_value(run).unwrap();
        for (flag, here, _) in FLAGS {
            let Keys(keys) = here else { continue };
            for key in *keys {
                let pointer = format!("/{}", key.replace('.', "/"));
                assert!(tree.pointer(&pointer).is_some(), "{flag}: {key}");
            }
        }
    }

    #[test]
    fn no_flag_is_listed_twice() {
        let mut names: Vec<&str> = FLAGS.iter().map(|(name, ..)| *name).collect();
        names.sort();
        let before = names.len();
        names.dedup();
        assert_eq!(names.len(), before);
    }
}

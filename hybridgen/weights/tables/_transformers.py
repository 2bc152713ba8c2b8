"""Shared by the tables of text models: config keys and activations of the library transformers.

Letters: d width, f hidden, h heads, k head width.
"""

import numpy as np

from hybridgen.weights.options import Options
from hybridgen.weights.rules import Part

# official name -> ours (nn/mlp.py): plain, gated
ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), ("gelu_exact", "geglu_exact")),
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast"), ("gelu", "geglu")),
    "gelu_accurate": ("gelu", "geglu"),
    "quick_gelu": ("quick_gelu", "quick_geglu"),
    "relu": ("relu", "reglu"),
    **dict.fromkeys(("silu", "swish"), ("silu", "swiglu")),
    **{name: (name, f"{name}_glu") for name in ("relu2", "leaky_relu", "mish", "tanh", "sigmoid")},
}

# keys for training, for text generation and for the library itself, which do not change the forward pass
SILENT = """
_name_or_path architectures transformers_version dtype torch_dtype torchscript use_bfloat16 return_dict problem_type
output_attentions output_hidden_states output_scores return_dict_in_generate use_cache id2label label2id
initializer_range initializer_factor attention_dropout dropout gradient_checkpointing finetuning_task
task_specific_params tokenizer_class prefix pad_token_id bos_token_id sep_token_id decoder_start_token_id
forced_bos_token_id forced_eos_token_id bad_words_ids suppress_tokens begin_suppress_tokens do_sample early_stopping
num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences min_length max_length remove_invalid_values
exponential_decay_length_penalty tf_legacy_loss tie_encoder_decoder is_encoder_decoder cross_attention_hidden_size
""".split()


def common(options: Options, kind: str, *older: str) -> None:
    """Reads keys that every config may have. UserError for another model type or an unsupported computation."""
    options.only("model_type", kind, *older)
    options.only("is_decoder", False)
    options.only("add_cross_attention", False)
    options.only("pruned_heads", {})
    options.only("chunk_size_feed_forward", 0)
    options.only("quantization_config", None)
    options.skip(*SILENT)


def activation(options: Options, key: str, default: str, gated: bool) -> str:
    """Our name of the feed-forward layer with the activation that `key` names."""
    return ACTIVATIONS[options.only(key, default, *(set(ACTIVATIONS) - {default}))][gated]


def optional(options: Options, key: str, default: int | None) -> int | None:
    """A count; a missing or null value is `default`."""
    return default if options.take(key, None) is None else options.count(key)


def branches(x: np.ndarray) -> tuple[Part, ...]:
    """Kernel `[d, branches, f]` of a feed-forward layer -> weights `[f, d]`; bias `[branches, f]` -> `[f]` each."""
    return tuple(Part(part.T, part.T.shape) for part in np.moveaxis(x, -2, 0))

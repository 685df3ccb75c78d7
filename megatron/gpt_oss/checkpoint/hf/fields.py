# Copyright (c) 2026, the megatron-core gptoss authors.

"""The fields of a Hugging Face config.json: defaults, supported values, behaviour of transformers.

Each field has the same effect as in transformers' GptOssForCausalLM, or is rejected by name.
`python -m megatron.gpt_oss.checkpoint.hf.fields` writes the tables of docs/hf_config.md.
"""

import math
from dataclasses import dataclass
from typing import Any, Callable

from megatron.gpt_oss.errors import CheckpointError
from megatron.gpt_oss.json_file import brief
from megatron.gpt_oss.presets import MAX_LAYERS

TRANSFORMERS = "5.24"  # version that this table describes
REQUIRED = object()  # default of a field that must be present

# Returns what is wrong with a value, or None.
Check = Callable[[Any], str | None]


@dataclass(frozen=True)
class Field:
    """A field of config.json, or of its rope_scaling.

    Attributes:
        name: of the field.
        default: value that transformers uses if the field is absent; REQUIRED if it fails then.
        check: checks a value.
        reads: supported values, as text.
        null: meaning of null in transformers, or "" if it is rejected.
        note: behaviour of transformers, for other values if the text names none.
    """

    name: str
    default: Any
    check: Check
    reads: str
    null: str = ""
    note: str = ""

    def of(self, config: dict, where: str) -> Any:
        """The value that transformers reads from a config.

        Raises:
            CheckpointError: names the field and its value.
        """
        if self.name not in config:
            if self.default is REQUIRED:
                raise CheckpointError(f"{where} lacks {self.name}; it must be {self.reads}.")
            return self.default
        value = config[self.name]
        if value is None and self.null:
            return None
        if problem := self.check(value):
            raise CheckpointError(f"{where} has {self.name} = {brief(value)}; {problem}.")
        return value


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    if type(value) is int:
        return abs(value) < 2**1000  # larger values overflow a float
    return type(value) is float and math.isfinite(value)


# Upper limits of sizes. Larger values come from damaged files and would exhaust memory or run for
# hours.
MAX_EXPERTS = 2**16
MAX_EXPERTS_IN_ALL = 2**20
_MAX_WIDTH = 2**20
_MAX_TOKENS = 2**31 - 1  # token ids and windows are int32
_MAX_POSITIONS = 2**53  # positions are exact in fp64
_MAX_THETA = 1e12
_MAX_FACTOR = 1e6
_MAX_FP32 = 3e38


def _integer(least: int, most: int) -> Check:
    def check(value: Any) -> str | None:
        if type(value) is int and least <= value <= most:
            return None
        return f"it must be an integer from {least} to {most}, without a decimal point"

    return check


def _number(most: float, above: float | None = None, least: float | None = None) -> Check:
    def check(value: Any) -> str | None:
        low = -most if least is None else least
        if is_number(value) and (value > above if above is not None else value >= low):
            if value <= most:
                return None
        if above is not None:
            return f"it must be a number above {above:g}, at most {most:g}"
        return f"it must be a number from {low:g} to {most:g}"

    return check


def _decimal(least: float, most: float, open_end: bool = False) -> Check:
    """A float; transformers rejects a number without a decimal point."""

    def check(value: Any) -> str | None:
        if type(value) is float and math.isfinite(value) and value <= most:
            if value > least or (value == least and not open_end):
                return None
        bound = f"above {least:g}, at most" if open_end else f"from {least:g} to"
        return f"it must be a number {bound} {most:g}, written with a decimal point"

    return check


def _only(*values: Any, because: str = "no other value is implemented") -> Check:
    shown = " or ".join(f"{value!r}" for value in values)

    def check(value: Any) -> str | None:
        # Compare types too, because 1 == True.
        if any(type(value) is type(allowed) and value == allowed for allowed in values):
            return None
        return f"gpt-oss has {shown} and {because}"

    return check


def _one_of_types(*types: type, what: str) -> Check:
    return lambda value: None if type(value) in types else f"it must be {what}"


def _token(value: Any) -> str | None:
    if type(value) is int:
        return None
    if type(value) is list and all(type(token) is int for token in value):
        return None
    return "it must be a token id"


def _quantization(value: Any) -> str | None:
    if isinstance(value, dict) and value.get("quant_method") == "mxfp4":
        return None
    return "no quantization but MXFP4 (quant_method 'mxfp4') is read; convert the weights to bf16"


def _empty(what: str) -> Check:
    return lambda value: None if value == {} else f"{what}; remove the field"


def _rejected(what: str) -> Check:
    return lambda value: f"{what}; remove the field"


_BOOLEAN = _one_of_types(bool, what="true or false")
_DTYPES = ("bfloat16", "float32", "float16", "auto")
_FIXED_BY_CODE = "transformers hardcodes the activation"

FIELDS = (
    Field("model_type", REQUIRED, _only("gpt_oss"), "'gpt_oss'"),
    Field("num_hidden_layers", 36, _integer(1, MAX_LAYERS), f"1 to {MAX_LAYERS}"),
    Field("hidden_size", 2880, _integer(1, _MAX_WIDTH), "any"),
    Field(
        "num_attention_heads", 64, _integer(1, _MAX_WIDTH), "any multiple of num_key_value_heads"
    ),
    Field("num_key_value_heads", 8, _integer(1, _MAX_WIDTH), "any"),
    Field(
        "head_dim",
        64,
        lambda value: _integer(2, _MAX_WIDTH)(value) or ("it must be even" if value % 2 else None),
        "any even number",
        note="if absent, 64 instead of hidden_size / num_attention_heads",
    ),
    Field("num_local_experts", 128, _integer(2, MAX_EXPERTS), f"2 to {MAX_EXPERTS}"),
    Field(
        "num_experts",
        None,
        _integer(2, MAX_EXPERTS),
        f"2 to {MAX_EXPERTS}",
        note="alias of num_local_experts; takes precedence",
    ),
    Field(
        "num_experts_per_tok",
        4,
        _integer(2, MAX_EXPERTS),
        "2 to num_local_experts",
        note="with 1 the router has no gradient, and Megatron-Core rejects it",
    ),
    Field(
        "experts_per_token",
        None,
        _integer(1, MAX_EXPERTS),
        "the value of num_experts_per_tok",
        null="ignored",
        note="ignored; rejected here if it contradicts num_experts_per_tok",
    ),
    Field("intermediate_size", 2880, _integer(1, _MAX_WIDTH), "any"),
    Field("vocab_size", 201088, _integer(1, _MAX_TOKENS), "any"),
    Field("max_position_embeddings", 131072, _integer(1, _MAX_POSITIONS), "any"),
    Field(
        "sliding_window",
        128,
        _integer(1, _MAX_TOKENS),
        f"1 to {_MAX_TOKENS}",
        note="number of keys per query, including its own; null is an error, even without a "
        "windowed layer",
    ),
    Field(
        "layer_types",
        None,
        lambda value: (
            None
            if type(value) is list
            and all(isinstance(kind, str) and kind in _LAYER_KINDS for kind in value)
            else "it must list sliding_attention or full_attention for every layer"
        ),
        "sliding_attention or full_attention for each layer",
        null="as absent",
        note="if absent, layers alternate and the first is windowed; 'attention' is full_attention",
    ),
    Field("rms_norm_eps", 1e-5, _decimal(0.0, 1.0), "0.0 to 1.0"),
    Field("swiglu_limit", 7.0, _decimal(0.0, _MAX_FP32, open_end=True), "above 0.0"),
    Field("swiglu_alpha", 1.702, _only(1.702), "1.702", note="other values are supported"),
    Field("hidden_act", "silu", _only("silu", because=_FIXED_BY_CODE), "'silu'", note="ignored"),
    Field("attention_bias", True, _only(True), "true", note="false removes the biases"),
    Field(
        "tie_word_embeddings",
        False,
        _only(False),
        "false",
        note="true shares the weights of embedding and output layer",
    ),
    Field(
        "attention_dropout",
        0.0,
        lambda value: (
            None
            if type(value) in (int, float) and value == 0
            else "gpt-oss is trained without; set it to 0.0"
        ),
        "0",
        note="other values apply in training",
    ),
    Field(
        "initializer_range",
        0.02,
        _decimal(0.0, _MAX_FACTOR),
        "0.0 or more",
        note="initialization only",
    ),
    Field(
        "pad_token_id",
        None,
        _one_of_types(int, what="a token id"),
        "an id of the vocabulary",
        null="as absent",
        note="the embedding of this token has no gradient",
    ),
    Field("bos_token_id", None, _token, "any", null="as absent", note="generation only"),
    Field("eos_token_id", None, _token, "any", null="as absent", note="generation only"),
    Field("is_causal", True, _only(True), "true", note="false disables the causal mask"),
    Field(
        "output_router_logits",
        False,
        _BOOLEAN,
        "any",
        note="true adds an auxiliary loss in training; use --moe-aux-loss-coeff here",
    ),
    Field(
        "router_aux_loss_coef",
        0.001,
        _decimal(-_MAX_FP32, _MAX_FP32),
        "any",
        note="coefficient of the auxiliary loss",
    ),
    Field("use_cache", True, _BOOLEAN, "any", note="generation only"),
    Field("return_dict", True, _only(True), "true", note="other values are an error"),
    Field(
        "dtype",
        None,
        _only(*_DTYPES),
        "bfloat16, float32, float16, auto",
        null="as absent",
        note="ignored here: weights keep the dtype of the files",
    ),
    Field("torch_dtype", None, _only(*_DTYPES), "as dtype", null="as absent"),
    Field(
        "quantization_config",
        None,
        _quantization,
        "MXFP4, if the files contain it",
        null="as absent",
        note="other methods are supported",
    ),
    Field(
        "rope_theta",
        150000.0,
        _number(_MAX_THETA, above=1),
        f"above 1, at most {_MAX_THETA:g}",
        note="used if rope_scaling (rope_parameters) has no rope_theta",
    ),
    Field(
        "partial_rotary_factor",
        None,
        _only(1, 1.0),
        "1",
        null="as absent",
        note="other values are an error",
    ),
    Field(
        "original_max_position_embeddings",
        None,
        _integer(1, _MAX_POSITIONS),
        "1 or more",
        note="for YaRN; takes precedence over the field in rope_scaling",
    ),
    Field(
        "rope_scaling",
        None,
        _one_of_types(dict, what="an object"),
        "the fields below",
        null="as absent",
        note="if not empty, used instead of rope_parameters",
    ),
    Field(
        "rope_parameters",
        None,
        _one_of_types(dict, what="an object"),
        "the fields below",
        null="as absent",
        note="if absent, YaRN of factor 32.0 over 4096 positions without truncation; {} is "
        "rope_type default",
    ),
    Field(
        "per_layer_config",
        None,
        _empty("layers that differ in more than layer_types are not implemented"),
        "{}",
        null="as absent",
        note="per-layer sizes",
    ),
    Field(
        "transformers_weights",
        None,
        _rejected("it names another weight file, which is not supported"),
        "none",
        null="as absent",
    ),
    Field(
        "fusion_config",
        None,
        _rejected("it makes transformers fuse modules, which is not supported"),
        "none",
        null="as absent",
    ),
    Field("_rope_type_labels", None, _rejected("it renames the keys of rope_parameters"), "none"),
)

# {value in layer_types: kind of layer}
_LAYER_KINDS = {
    "sliding_attention": "sliding_attention",
    "full_attention": "full_attention",
    "attention": "full_attention",
}

# Fields of rope_scaling or rope_parameters for rope_type yarn. For rope_type default only
# rope_theta is used. transformers ignores keys that are not listed here.
ROPE_TYPES = ("yarn", "default")
ROPE_FIELDS = (
    Field(
        "rope_type",
        None,
        _only(*ROPE_TYPES),
        "'yarn' or 'default' (no scaling)",
        note="if absent, `type`, else 'default'; linear, dynamic, longrope, llama3 and "
        "proportional are supported",
    ),
    Field("type", None, _only(*ROPE_TYPES), "as rope_type; used if that is absent"),
    Field(
        "rope_theta",
        None,
        _number(_MAX_THETA, above=1),
        f"above 1, at most {_MAX_THETA:g}",
        note="if absent, rope_theta of config.json",
    ),
    Field(
        "factor",
        REQUIRED,
        _number(_MAX_FACTOR, above=0),
        f"above 0, at most {_MAX_FACTOR:g}",
        null="max_position_embeddings / original_max_position_embeddings",
        note="required",
    ),
    Field(
        "original_max_position_embeddings",
        None,
        lambda value: (
            None
            if is_number(value) and 1 <= value <= _MAX_POSITIONS and value == int(value)
            else ("it must be an integer of 1 or more")
        ),
        "1 or more",
        note="if absent, max_position_embeddings; initial_context_length is ignored",
    ),
    Field(
        "beta_fast", 32, _number(_MAX_FACTOR, least=0), "0 or more", null="32", note="0 means 32"
    ),
    Field("beta_slow", 1, _number(_MAX_FACTOR, least=0), "0 or more", null="1", note="0 means 1"),
    Field(
        "truncate",
        True,
        _BOOLEAN,
        "true or false",
        null="false",
        note="rounds the ends of the ramp",
    ),
    Field(
        "attention_factor",
        None,
        _number(_MAX_FACTOR),
        "any number",
        null="as absent",
        note="scales cosine and sine; if absent, computed from factor, mscale and mscale_all_dim",
    ),
    Field(
        "mscale",
        None,
        _number(_MAX_FACTOR),
        "any number",
        null="as absent",
        note="used if mscale_all_dim is present too and neither is 0",
    ),
    Field(
        "mscale_all_dim",
        None,
        _number(_MAX_FACTOR),
        "any number",
        null="as absent",
        note="see mscale",
    ),
    Field(
        "partial_rotary_factor",
        1.0,
        _only(1, 1.0),
        "1",
        note="other values are an error",
    ),
)

# Keys that would replace a method or class attribute of transformers' config class.
RESERVED = frozenset(
    """_auto_class _check_received_keys _decode_special_floats _dict_from_json_file
    _encode_special_floats _get_config_dict _get_files_timestamps _get_generation_parameters
    _getattr_without_heterogeneous_validation _hasattr_without_heterogeneous_validation
    _iter_config_keys_with_heterogeneous_adjustment _remove_keys_not_serialized
    _update_heterogeneous_to_dict_output _upload_modified_files _validate_axial_rope_parameters
    _validate_default_rope_parameters _validate_dynamic_rope_parameters
    _validate_linear_rope_parameters _validate_llama3_rope_parameters
    _validate_longrope_rope_parameters _validate_proportional_rope_parameters
    _validate_yarn_rope_parameters allow_global_per_layer_attribute_access attribute_map
    base_config_key base_model_ep_plan base_model_fsdp_plan base_model_pp_plan base_model_tp_plan
    convert_rope_params_to_dict default_config_fields default_rope_type default_theta
    dict_dtype_to_str extra_config_files extra_files from_dict from_json_file from_pretrained
    get_config_dict get_mtp_config get_text_config ignore_keys_at_rope_validation is_custom_code
    is_heterogeneous is_remote_code nested_rope_parameter_keys per_layer_attributes push_to_hub
    register_for_auto_class save_pretrained serialize_explicit_per_layer_config
    standardize_rope_params sub_configs sub_configs_defaults to_dict to_diff_dict to_json_file
    to_json_string update update_from_string use_return_dict validate validate_architecture
    validate_layer_type validate_output_attentions validate_rope validate_token_ids""".split()
)


def read_fields(config: dict, where: str) -> dict:
    """The value of each of `FIELDS` as transformers reads it.

    Aliases of `num_local_experts` and defaults of `layer_types` (one kind per layer) are resolved.
    `rope` is added, see `_read_rope`.

    Args:
        config: config.json.
        where: its name, for messages.
    Raises:
        CheckpointError: names the field, its value and what is wrong with it.
    """
    for name in config:
        if name in RESERVED:
            raise CheckpointError(
                f"{where} has {name} = {brief(config[name])}, which would replace a part of "
                "transformers' config class; remove the field."
            )
    read = {field.name: field.of(config, where) for field in FIELDS}
    if read["num_experts"] is not None:
        read["num_local_experts"] = read["num_experts"]
    read["rope"] = _read_rope(config, read, where)
    _check_together(read, where)
    layers = read["num_hidden_layers"]
    kinds = read["layer_types"]
    if kinds is None:
        read["layer_types"] = alternating_layers(layers)
    else:
        read["layer_types"] = [_LAYER_KINDS[kind] for kind in kinds]
    return read


def alternating_layers(num_layers: int) -> list[str]:
    """The layer_types of the published models: the first windowed, the second full, ..."""
    return ["full_attention" if i % 2 else "sliding_attention" for i in range(num_layers)]


def _check_together(read: dict, where: str) -> None:
    """Reject values that contradict each other."""
    heads, groups = read["num_attention_heads"], read["num_key_value_heads"]
    experts, top_k = read["num_local_experts"], read["num_experts_per_tok"]
    listed, pad = read["layer_types"], read["pad_token_id"]
    for wrong, name, other in (
        (heads % groups, "num_attention_heads", "num_key_value_heads, which must divide it"),
        (top_k > experts, "num_experts_per_tok", "num_local_experts, which must not be less"),
        (
            read["experts_per_token"] not in (None, top_k),
            "experts_per_token",
            "num_experts_per_tok, which transformers reads; make the two equal",
        ),
    ):
        if wrong:
            second = other.split(",")[0]
            raise CheckpointError(
                f"{where} has {name} = {read[name]} and {second} = {read[second]}"
                f"{other.removeprefix(second)}."
            )
    if read["num_hidden_layers"] * experts > MAX_EXPERTS_IN_ALL:
        raise CheckpointError(
            f"{where} has num_hidden_layers = {read['num_hidden_layers']} and num_local_experts = "
            f"{experts}, more than {MAX_EXPERTS_IN_ALL} experts in all."
        )
    if listed is not None and len(listed) != read["num_hidden_layers"]:
        raise CheckpointError(
            f"{where} has layer_types of {len(listed)} layers and num_hidden_layers = "
            f"{read['num_hidden_layers']}; make the two equal."
        )
    if pad is not None and not -read["vocab_size"] <= pad < read["vocab_size"]:
        raise CheckpointError(
            f"{where} has pad_token_id = {pad}; it must be below vocab_size = {read['vocab_size']}."
        )


def _read_rope(config: dict, read: dict, where: str) -> dict:
    """The rotary embedding as transformers reads it, by the names of `ROPE_FIELDS`.

    Returns:
        `rope_type`, `rope_theta`, and for YaRN all other fields; `attention_factor`, `mscale` and
        `mscale_all_dim` are None if they are not used.
    """
    name = "rope_scaling" if read["rope_scaling"] else "rope_parameters"
    given = read[name]
    where = f"{where}: {name}"
    if given is None:
        given = {
            "rope_type": "yarn",
            "factor": 32.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        }
    nested = [kind for kind in _LAYER_KINDS if kind in given]
    if nested:
        raise CheckpointError(
            f"{where} has {nested[0]} = {brief(given[nested[0]])}; gpt-oss rotates all layers "
            "alike, and transformers refuses parameters for each kind of layer."
        )
    fields = {field.name: field for field in ROPE_FIELDS}
    kind = fields["rope_type"].of(given, where)
    if "rope_type" not in given:
        kind = fields["type"].of(given, where) or "default"
    rope = {"rope_type": kind, "rope_theta": fields["rope_theta"].of(given, where)}
    rope["rope_theta"] = rope["rope_theta"] or read["rope_theta"]
    if kind == "default":
        return rope
    for field in ROPE_FIELDS[3:]:
        rope[field.name] = field.of(given, where)
    longest = read["max_position_embeddings"]
    original = read["original_max_position_embeddings"]
    rope["original_max_position_embeddings"] = int(
        original or rope["original_max_position_embeddings"] or longest
    )
    if rope["factor"] is None:
        rope["factor"] = longest / rope["original_max_position_embeddings"]
    rope["beta_fast"], rope["beta_slow"] = rope["beta_fast"] or 32, rope["beta_slow"] or 1
    rope["truncate"] = bool(rope["truncate"])
    if not (rope["mscale"] and rope["mscale_all_dim"]):
        rope["mscale"] = rope["mscale_all_dim"] = None
    elif rope["factor"] > 1 and 0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) == -1:
        raise CheckpointError(
            f"{where} has mscale_all_dim = {rope['mscale_all_dim']}, by which transformers would "
            "divide by 0."
        )
    return rope


def markdown() -> str:
    """The tables of docs/hf_config.md."""
    parts = []
    for title, fields in (
        ("config.json", FIELDS),
        ("rope_scaling or rope_parameters", ROPE_FIELDS),
    ):
        lines = [f"| {title} | default | null | supported | transformers |", "| --- " * 5 + "|"]
        for field in fields:
            default = "required" if field.default is REQUIRED else _json(field.default)
            row = (f"`{field.name}`", default, field.null or "rejected", field.reads, field.note)
            lines.append("| " + " | ".join(row) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _json(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


if __name__ == "__main__":
    import re
    import sys
    from pathlib import Path

    page = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/hf_config.md")
    text = re.sub(
        r"(<!-- begin fields.*?-->\n\n).*(\n\n<!-- end fields -->)",
        lambda match: match[1] + markdown() + match[2],
        page.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    page.write_text(text, encoding="utf-8")

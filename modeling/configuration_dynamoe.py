# SPDX-License-Identifier: Apache-2.0
"""Configuration of a DynaMoE model: the dense base's own config, unmodified, plus how its MLPs are nested and routed."""

import copy
from itertools import pairwise
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .checks import check_expert, check_model_type, check_one_of, check_sensitivity, is_number, is_size, is_whole
from .dense_base import outside_mlps
from .difficulty import SIMILARITIES
from .routing import ROUTERS, ROUTES, TokenRouter
from .sparsity import check_density_path, check_ramp, check_thresholds


# Raised when a folder written today could not be read rightly by yesterday's code. Old versions keep loading.
FORMAT_VERSION = 3
# Where the Auto classes find the code beside the weights.
AUTO_MAP = {
    "AutoConfig": "configuration_dynamoe.DynaMoEConfig",
    "AutoModel": "modeling_dynamoe.DynaMoEModel",
    "AutoModelForCausalLM": "modeling_dynamoe.DynaMoEForCausalLM",
}
# Fields that name code of elsewhere, which whoever trusts the folder's would run.
CODE_FIELDS = ("auto_map", "custom_pipelines")
# Fields that say something else about this model than about its base, so they are never answered from there.
OWN_FIELDS = (*CODE_FIELDS, "architectures", "quantization_config", "compression_config")


class DynaMoEConfig(PreTrainedConfig):
    r"""
    Everything the dense base knows about itself is in `base_config`; reading any other attribute (`hidden_size`,
    `vocab_size`, `final_logit_softcapping`, ...) is answered from there, and so is writing one.

    Args:
        base_config (`dict` or `PreTrainedConfig`, *optional*):
            Config of the dense base. Defaults to a Llama config, so that `DynaMoEConfig()` is valid.
        expert_widths (`list[float]` or `list[list[float]]`, defaults to `[0.25, 0.5, 0.75, 1.0]`):
            Width of each expert as a fraction of the MLP width, in a mixture of that of each of its experts: rising, ending at 1,
            optionally starting at 0 (a null expert). A list of lists gives one ladder for each layer; all have the same number of
            experts.
        cut_widths (`list[list[int]]`, *optional*):
            For each layer, of each expert of a mixture the neurons that were not cut off for good (`dynamoe convert --cut`): the weights
            of the others are zeros. `None` for layers of another kind.
        similarity (`str`, defaults to `"loss_weighted"`):
            How close expert e comes to the full MLP for one token; s_{E-1} = 1 and O_e is the output of expert e:
            `"projection"` <O_e, O> / <O, O>, `"cosine"`, `"relative_error"` 1 - |O - O_e| / |O|, and
            `"loss_weighted"` 1 / (1 + c_l |O - O_e|^2), where c_l (`error_weights[l]`) is the mean squared gradient of the
            LM loss at the output of layer l's MLP, so that one threshold means the same harm in every layer.
            `"loss_gain"` 1 / (1 + c_l max_{f > e} (|O - O_e|^2 - |O - O_f|^2) / (w_f - w_e)) also asks what a wider expert
            f costs (w: shares of the width): the label has the least c_l |O - O_e|^2 + lambda w_e, lambda = 1 / theta - 1.
        error_weights (`list[float]`, *optional*): c_l, one for each layer. Measured by `dynamoe convert`.
        router_type (`str`, defaults to `"profile"`):
            `"profile"`: the router predicts s_0 .. s_{E-2}, so that sensitivity is a dial after training.
            `"argmax"` (the paper's): E logits, the largest wins, sensitivity is fixed by the training.
        router_dim (`int`, *optional*):
            Hidden size of each router. By default so that a router costs about 1% of its MLP.
        sensitivity (`float`, defaults to 1.0):
            theta in (0, 1]: a token takes the smallest expert with predicted s_e >= theta. 1 is the dense model.
        budgets (`dict[str, float]`, *optional*):
            Mean share of the MLPs' weights that a token reads -> sensitivity that reaches it, written by `dynamoe calibrate`.
        thresholds (`dict[str, list]`, *optional*):
            Sizes under which what a product reads is left out: `density` (K,), and for each of these densities and each layer
            `input` (K, L), of |x| that gate and up read, and `hidden` (K, L), of |h| that down reads. Without them experts are
            dense.
        threshold_ramp (`float`, defaults to 0.0):
            r in [0, 1): what is smaller than a threshold t falls to zero in a straight line between t and (1 - r) t. 0 is a step, which
            keeps in one engine and leaves out in another what stands within rounding of it; with 0.2 they agree at a budget of 0.75.
            It costs about 1% of perplexity there in a model that was not trained with it, and larger thresholds for the same share of
            weights: `dynamoe calibrate --threshold-ramp` fits them.
        density_path (`list[list[float]]`, *optional*):
            Rising pairs of sensitivity and density: how much is left out inside the experts at each place of the dial. Between
            them, and up to the dense model at (1, 1), the dial interpolates. Written by `dynamoe calibrate`.
        force_expert (`int`, *optional*): One expert for every token, whatever the routers say.
        train_route (`str`, defaults to `"label"`): Expert of each token while training: `"label"`, `"router"` or `"random"`.
        train_sensitivity (`list[float]`, defaults to `[0.2, 0.95]`):
            While training, each sequence draws its sensitivity uniformly from this range.
        router_loss_coef (`float`, defaults to 1.0): Weight of the router loss in `loss` when `labels` are given.
        format_version (`int`): Version of the folder format, checked when loading.
    """

    model_type = "dynamoe"
    sub_configs = {"base_config": AutoConfig}
    keys_to_ignore_at_inference = [
        "past_key_values",
        "router_logits",
        "expert_indices",
        "mlp_shares",
        "router_loss",
        "lm_loss",
    ]

    def __init__(
        self,
        base_config=None,
        expert_widths=None,
        cut_widths=None,
        similarity="loss_weighted",
        error_weights=None,
        router_type="profile",
        router_dim=None,
        sensitivity=1.0,
        budgets=None,
        thresholds=None,
        threshold_ramp=0.0,
        density_path=None,
        force_expert=None,
        train_route="label",
        train_sensitivity=(0.2, 0.95),
        router_loss_coef=1.0,
        output_router_logits=False,
        format_version=FORMAT_VERSION,
        **kwargs,
    ):
        if not is_whole(format_version) or not 1 <= format_version <= FORMAT_VERSION:
            raise ValueError(
                f"This model folder has format_version={format_version!r}, and this code reads 1 to {FORMAT_VERSION}. "
                "Update the package (`pip install -U dynamoe_hf`), or load the folder with `trust_remote_code=True` and "
                "without importing `dynamoe_hf`, so that the code beside the weights is used."
            )
        if isinstance(base_config, dict):
            kwargs = _without_copies(kwargs, base_config)
        self.__dict__["base_config"] = _base_config(base_config)
        self.expert_widths = [0.25, 0.5, 0.75, 1.0] if expert_widths is None else _as_lists(expert_widths, float)
        self.cut_widths = _as_lists(cut_widths)
        self.similarity = similarity
        self.error_weights = error_weights
        self.router_type = router_type
        self.router_dim = router_dim
        self.sensitivity = sensitivity
        self.budgets = _with_text_keys(budgets)
        self.thresholds = thresholds
        self.threshold_ramp = threshold_ramp
        self.density_path = _as_lists(density_path or [])
        self.force_expert = force_expert
        self.train_route = train_route
        self.train_sensitivity = _as_lists(train_sensitivity)
        self.router_loss_coef = router_loss_coef
        self.output_router_logits = output_router_logits
        self.format_version = format_version
        self.__dict__["base_model_tp_plan"] = outside_mlps(self.base_config.base_model_tp_plan)
        # The trap: `super().__init__` hands its implementations down, so a base already in memory would lose its own.
        kwargs.setdefault("attn_implementation", self.base_config._attn_implementation)
        kwargs.setdefault("experts_implementation", getattr(self.base_config, "_experts_implementation", None))
        kwargs["auto_map"] = {**AUTO_MAP, **kwargs.get("auto_map", {})}
        super().__init__(**kwargs)
        self.check()

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """
        As the base class. With a smaller `num_hidden_layers` the first layers stay, as in a dense model, and what was calibrated on all
        of them goes. Raises `ValueError` for the config of a dense model, whose family would be lost in silence.
        """
        check_model_type(config_dict.get("model_type"))
        asked: Any = kwargs.get("num_hidden_layers")
        base = config_dict.get("base_config", {})
        name = _layers_name(base)
        found: Any = base.get(name)
        if is_whole(asked) and is_whole(found) and 0 < asked < found:
            super().from_dict(config_dict)  # tells what is wrong with any field
            config_dict = _first_layers(config_dict, name, asked)
        return super().from_dict(config_dict, **kwargs)

    def check(self) -> None:
        """Raise `ValueError`, with the name of the field, if a field is not what it must be, or does not fit the others."""
        layers = self._checked_layers()
        self._check_widths(layers)
        self._check_cuts(layers)
        weights = self.error_weights
        if weights is not None and not (isinstance(weights, (list, tuple)) and all(map(is_size, weights))):
            raise ValueError(
                f"`error_weights` must be finite numbers, none negative, found {weights!r}. `dynamoe convert` measures them."
            )
        if weights is not None and len(weights) != layers:
            raise ValueError(f"`error_weights` must have one entry for each of {layers} layers, found {len(weights)}.")
        check_one_of("similarity", self.similarity, SIMILARITIES)
        check_one_of("router_type", self.router_type, ROUTERS)
        check_one_of("train_route", self.train_route, ROUTES)
        if self.router_dim is not None and not (is_whole(self.router_dim) and self.router_dim >= 1):
            raise ValueError(
                f"`router_dim` must be a whole number of at least 1, found {self.router_dim!r}. None gives about 1% of the MLP."
            )
        check_sensitivity(self.sensitivity)
        drawn = self.train_sensitivity
        pair = isinstance(drawn, (list, tuple)) and len(drawn) == 2 and all(map(is_number, drawn))
        if not pair or not 0 < drawn[0] <= drawn[1] <= 1:
            raise ValueError(
                f"`train_sensitivity` must be two numbers that rise within 0 and 1, found {drawn!r}, such as [0.2, 0.95]."
            )
        self._check_budgets()
        check_thresholds(self.thresholds, layers)
        check_ramp(self.threshold_ramp)
        check_density_path(self.density_path, self.thresholds)
        check_expert(self.force_expert, self.expert_count)
        if not is_size(self.router_loss_coef):
            raise ValueError(f"`router_loss_coef` must be a finite number of at least 0, found {self.router_loss_coef!r}.")
        if not isinstance(self.output_router_logits, bool):
            raise ValueError(f"`output_router_logits` must be True or False, found {self.output_router_logits!r}.")

    def _checked_layers(self):
        """Number of layers of the base."""
        layers: Any = getattr(self.base_config, "num_hidden_layers", None)
        if not is_whole(layers) or layers < 1:
            raise ValueError(
                f"`base_config` must have layers, found num_hidden_layers={layers!r}. Give the config of a dense model."
            )
        return layers

    def _check_widths(self, layers):
        ladders: list = self.expert_widths if self._per_layer else [self.expert_widths]
        for ladder in ladders:
            numbers = isinstance(ladder, list) and all(map(is_number, ladder))
            if not numbers or not ladder or ladder[0] < 0 or ladder[-1] != 1 or not all(a < b for a, b in pairwise(ladder)):
                raise ValueError(
                    f"`expert_widths` must rise from at least 0 to exactly 1, found {ladder!r}. "
                    "Give fractions of the MLP width, for example [0.25, 0.5, 0.75, 1]."
                )
        if len({len(ladder) for ladder in ladders}) > 1:
            raise ValueError(
                f"`expert_widths` must hold equally many experts in every layer, found {[len(x) for x in ladders]}. "
                "Repeat the ladder of one layer with other fractions instead."
            )
        if self._per_layer and len(ladders) != layers:
            raise ValueError(f"`expert_widths` must have one entry for each of {layers} layers, found {len(ladders)}.")

    def _check_cuts(self, layers):
        cuts = self.cut_widths
        if cuts is None:
            return
        lists = isinstance(cuts, list) and all(each is None or isinstance(each, list) for each in cuts)
        if not lists or not all(is_whole(width) and width >= 0 for each in cuts for width in each or []):
            raise ValueError(
                f"`cut_widths` must be lists of whole numbers of at least 0, or None for a layer, found {cuts!r}. `dynamoe convert --cut` "
                "writes them."
            )
        if len(cuts) != layers:
            raise ValueError(f"`cut_widths` must have one entry for each of {layers} layers, found {len(cuts)}.")

    def _check_budgets(self):
        if not isinstance(self.budgets, dict):
            raise ValueError(
                f"`budgets` must be pairs of share and sensitivity, found {self.budgets!r}. `dynamoe calibrate` writes them."
            )
        for share, sensitivity in self.budgets.items():
            if not isinstance(share, str) or not _is_share(share):
                raise ValueError(
                    f"`budgets` must have shares of the MLPs' weights in (0, 1] as keys, found {share!r}. `dynamoe calibrate` writes them."
                )
            if not is_number(sensitivity) or not 0 < sensitivity <= 1:
                raise ValueError(
                    f"`budgets` must have sensitivities in (0, 1] as values, found {sensitivity!r} for {share}. `dynamoe calibrate` "
                    "writes them."
                )
        known = sorted((float(share), sensitivity) for share, sensitivity in self.budgets.items())
        if any(low > high for (_, low), (_, high) in pairwise(known)):
            raise ValueError(
                f"`budgets` must have sensitivities that rise with their shares, found {self.budgets}. Calibrate again."
            )

    def save_pretrained(self, *args, **kwargs):
        """As the base class, with the checks of loading: what is written can be read. It is of today's format, as the code beside it."""
        self.check()
        self.format_version = FORMAT_VERSION
        super().save_pretrained(*args, **kwargs)

    @property
    def _per_layer(self):
        widths: Any = self.expert_widths
        return isinstance(widths, list) and bool(widths) and isinstance(widths[0], list)

    @property
    def has_dial(self) -> bool:
        """Whether `sensitivity` has a meaning after training. The argmax router has it fixed."""
        return self.router_class.has_dial

    @property
    def is_dense(self) -> bool:
        """Whether every token takes the full width, unless a call says otherwise."""
        if self.force_expert is not None:
            return self.force_expert == self.expert_count - 1
        return self.has_dial and self.sensitivity >= 1

    @property
    def router_class(self) -> type[TokenRouter]:
        """The class of the routers."""
        return ROUTERS[self.router_type]

    @property
    def weighs_loss(self) -> bool:
        """Whether the similarity is weighed by what an error costs in loss (`error_weights`)."""
        return SIMILARITIES[self.similarity].loss_weighted

    @property
    def expert_count(self) -> int:
        """Experts of each layer."""
        widths: list = self.expert_widths
        return len(widths[0] if self._per_layer else widths)

    def layer_widths(self, layer, mlp_width):
        """Widths in neurons of the experts of `layer`, whose MLP has `mlp_width` neurons: `list[int]`, rising."""
        ladder = self.expert_widths[layer] if self._per_layer else self.expert_widths
        widths = [round(fraction * mlp_width) for fraction in ladder]
        if any(a >= b for a, b in zip(widths, widths[1:])):
            raise ValueError(
                f"`expert_widths` {ladder} give {widths} neurons on an MLP of {mlp_width}, which do not rise. "
                "Use fewer experts, or fractions further apart."
            )
        return widths

    def sensitivity_of(self, budget):
        """The sensitivity that reaches `budget` (mean share of the MLPs' weights), interpolated between calibrated budgets."""
        known = sorted((float(share), theta) for share, theta in self.budgets.items()) + [(1.0, 1.0)]
        if len(known) == 1:
            raise ValueError("This model has no calibrated budgets. Run `dynamoe calibrate FOLDER --budgets 0.5,0.75` first.")
        if not known[0][0] <= budget <= 1:
            raise ValueError(
                f"budget={budget} is outside the calibrated range {known[0][0]:g} to 1. "
                f"Choose a budget inside it, or run `dynamoe calibrate FOLDER --budgets {budget:g}`."
            )
        for (low, theta_low), (high, theta_high) in zip(known, known[1:]):
            if budget <= high:
                part = (budget - low) / (high - low) if high > low else 0.0
                return theta_low + part * (theta_high - theta_low)
        return 1.0

    def to_dict(self):
        """As the base class, and the base's fields at the top too, where PEFT and the engines look for `hidden_size` and the like."""
        fields = super().to_dict()
        return {**{name: value for name, value in fields["base_config"].items() if name not in OWN_FIELDS}, **fields}

    def get_text_config(self, decoder=None, encoder=None):
        # TRL and vLLM ask for the text config to find `hidden_size` and the logit scale, which delegation answers;
        # `generate` asks for the decoder's, to lay out the cache.
        return self.__dict__["base_config"] if decoder else self

    def __getattr__(self, name):
        # Private names stay ours: copy and pickle ask for them before `base_config` exists.
        base = self.__dict__.get("base_config")
        if name.startswith("_") or base is None or name in OWN_FIELDS:
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        return getattr(base, name)

    def __setattr__(self, name, value):
        base = self.__dict__.get("base_config")
        if base is None or name.startswith("_") or name == "base_config":
            super().__setattr__(name, value)
        elif name in self.__dict__ or name in OWN_FIELDS or hasattr(type(self), name):
            super().__setattr__(name, value)
            if name in ("output_hidden_states", "output_attentions", "return_dict", "dtype"):
                setattr(base, name, value)  # the backbone reads its own config
        elif hasattr(base, name):
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)


def _base_config(given):
    """The config of the dense base, from one, from its dictionary, or by default of a Llama."""
    if given is None:
        return AutoConfig.for_model("llama")
    if isinstance(given, dict):
        fields = copy.deepcopy(given)
        try:
            given = AutoConfig.for_model(fields.pop("model_type", "llama"), **fields)
        except Exception as error:  # whatever the config of a family raises
            raise ValueError(f"`base_config` is not the config of a known family: {error}") from error
    if not isinstance(given, PreTrainedConfig) or given.model_type == DynaMoEConfig.model_type:
        raise ValueError(
            f"`base_config` must be the config of a dense model, or a dictionary with its fields, found {type(given).__name__}."
        )
    return given


def _layers_name(base_config):
    """What a base's own config calls the number of its layers: `n_layer` in GPT-2's."""
    family = base_config.get("model_type")
    names = CONFIG_MAPPING[family].attribute_map if family in CONFIG_MAPPING else {}
    return names.get("num_hidden_layers", "num_hidden_layers")


def _first_layers(fields, layers_name, layers):
    """
    The fields of a config, already checked, with the entries of the first layers alone and without what was calibrated on all.
    `layers_name`: what the base calls their number.
    """
    base = {**fields["base_config"], layers_name: layers}
    cut = {"base_config": base, layers_name: layers, "budgets": None, "density_path": None}
    lists = ((base, "layer_types"), (base, "mlp_layer_types"), (fields, "error_weights"), (fields, "cut_widths"))
    for owner, name in lists:
        if owner.get(name) is not None:
            (cut if owner is fields else base)[name] = owner[name][:layers]
    if isinstance(fields.get("expert_widths", [0])[0], list):
        cut["expert_widths"] = fields["expert_widths"][:layers]
    if fields.get("thresholds") is not None:
        cut["thresholds"] = {name: [row[:layers] for row in rows] if name != "density" else rows
                             for name, rows in fields["thresholds"].items()}  # fmt: skip
    copies = {name: base[name] for name in ("layer_types", "mlp_layer_types") if name in fields.keys() & base.keys()}
    return {**fields, **copies, **cut}


def _without_copies(fields, base_config):
    """`fields` without the base's, which `to_dict` writes a second time. Raises `ValueError` where the two differ."""
    copies = fields.keys() & base_config.keys() - PreTrainedConfig().to_dict().keys() - {*OWN_FIELDS}
    for name in sorted(copies):
        if fields[name] != base_config[name]:
            raise ValueError(
                f"`{name}` is there twice and differs: found {fields[name]!r}, and {base_config[name]!r} in `base_config`. "
                "Change both, or give it to `from_pretrained` as an argument."
            )
    return {name: value for name, value in fields.items() if name not in copies}


def _as_lists(value, number=lambda number: number):
    """Lists in place of tuples, as in JSON, and each number as `number` gives it. What is neither stays, and `check` tells of it."""
    if isinstance(value, (list, tuple)):
        return [_as_lists(each, number) for each in value]
    return number(value) if is_number(value) else value


def _with_text_keys(budgets):
    """Budgets with keys as in JSON. What is not a dictionary stays, and `check` tells of it."""
    if not isinstance(budgets, dict):
        return budgets or {}
    return {str(key) if is_number(key) else key: value for key, value in budgets.items()}


def _is_share(text):
    try:
        return 0 < float(text) <= 1
    except (TypeError, ValueError):
        return False


__all__ = ["DynaMoEConfig"]

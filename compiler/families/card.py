"""The fact card of a model family: what is true before any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from attrs import field, frozen

from compiler.families.whole_file import WholeFile


@frozen(kw_only=True)
class KnownModel:
    """A published model whose configurations we carry, so that it plans offline."""

    base: str  # hub id
    resolution: int  # pixels it was made for
    configs: Mapping[str, Mapping[str, Any]]  # component -> configuration as Diffusers stores it
    parameters: Mapping[str, int]  # component -> parameters
    # Where its own model card says other than the family's pipeline:
    prompt_length: int | None = None
    guidance: float | None = None
    inference_steps: int | None = None
    index: Mapping[str, Any] = field(factory=dict)  # what its model_index.json says besides
    undistilled: str = ""
    """The base to train in place of this one, which was distilled into few steps; "": it wasn't."""


Configs = Mapping[str, Mapping[str, Any]]


def counted(*keys: str) -> Callable[[Mapping[str, Any]], int]:
    """Of a configuration, the sum of what `keys` say; 0 where they say nothing."""
    return lambda config: sum(int(config.get(key) or 0) for key in keys)


@frozen(kw_only=True)
class TokenShift:
    """What the pipeline takes for a shift by resolution where the scheduler doesn't say."""

    base_tokens: int
    max_tokens: int
    base_shift: float
    max_shift: float
    stated: bool = True  # the pipeline takes a scheduler's own numbers instead
    far: tuple[int, float, float] | None = None
    """Of more tokens than the first, mu is on another line: its slope, and mu at no token."""


@frozen(kw_only=True)
class FamilyCard:
    """Facts of one family. Sources stand beside the values in the family's module."""

    name: str
    title: str
    pipeline: str  # Diffusers' pipeline class
    components: Mapping[str, str]  # component -> class name, in model_index.json's order
    text_encoders: tuple[str, ...]  # component names, in the order they are run
    trained_component: Literal["transformer", "unet"]
    blocks: tuple[str, ...]
    """The blocks that checkpointing and offloading count: names of module lists, or patterns of
    module names (regular expressions, full match)."""
    depth: Callable[[Mapping[str, Any]], int]
    """How many there are, by the trained component's configuration."""
    runs: Callable[[Mapping[str, Any]], Sequence[int] | None] | None
    """Numbers of equal blocks that follow each other, by the trained component's configuration;
    None where they are not so regular. A last block that differs is not counted. With `places`
    each stands for several runs, all of that many."""
    shortened: Callable[[Mapping[str, Any], Sequence[int]], dict[str, Any]]
    """The configuration with other such numbers."""
    latent_channels_key: str  # key of the vae's configuration
    moments: tuple[str, ...]  # what is cached of a picture, each of the latents' shape
    embedding_shapes: Callable[[Configs, int], Mapping[str, tuple[int, ...]]]
    """Of one prompt of full length, by the configurations and the plan's prompt length."""
    unpadded_text: bool  # only a prompt's own tokens are cached
    prompt_length: int  # tokens of the longest encoder, as the pipeline's inference default
    instruction: tuple[str, ...]  # the pipeline's default instruction lines; empty: none
    default_resolution: int
    sampling: str  # default timestep density
    default_shift: float  # used where the scheduler's configuration states none
    token_shift: TokenShift | None  # None: the pipeline knows no shift by resolution
    prediction: Literal["flow", "epsilon"]
    """"epsilon": the model is trained on a table of noise levels; whether it predicts the noise or
    v is for the base's scheduler to say."""
    guidance: float  # the pipeline's own default
    inference_steps: int
    target_sets: Mapping[str, tuple[str, ...]]  # name -> module name patterns (full match)
    default_targets: str  # a name in target_sets
    fp16_overflows: bool
    masked_attention: bool  # the trained component hands its attention a mask
    attention: str  # in words: which attention has kernels to choose from
    known: tuple[KnownModel, ...]
    traps: tuple[str, ...] = field(default=())  # sentences shown by the plan where they apply
    pipeline_options: Mapping[str, Any] = field(factory=dict)
    """What else the pipeline's class must be given."""
    few_step_pipeline: str = ""
    """Diffusers' pipeline of models that were distilled into few steps; "": there is none."""
    places: Callable[[Mapping[str, Any]], Sequence[tuple[int | None, int]]] | None = None
    """Where the runs are: (number in `runs`, blocks) of each of them in the model's order, and
    (None, blocks) of those in no run. None: each follows the one before it, from the first block
    on."""
    latent_statistics: bool = False
    """Latents are normalised by `latents_mean` and `latents_std` of the vae's configuration."""
    size_conditions: bool = False  # the model is told each picture's size and crop
    refines: float = 0.0
    """The share of the noise levels, from the last on, by which the pipeline refines a picture that
    it is given, by its own default; 0: it draws from noise."""
    made_for: float = 1.0  # the highest noise level that its models are trained on and used at
    timesteps: int = 1000  # of its table of noise levels, where it has one
    time: Literal["sigma", "1000 sigma", "1 - sigma"] = "sigma"
    """What a flow's model is told as its time (times the `timestep_scale` of its configuration)."""
    overflowing: tuple[str, ...] = ()
    """Components beside the trained one that can't run in fp16; a vae that says `force_upcast =
    false` can."""
    zeros_for_empty: bool | None = None
    """Whether an empty negative prompt is zeros where the base's model_index.json doesn't say
    (`force_zeros_for_empty_prompt`). None: it is always encoded."""
    packed: int = 1
    """Latents along the edge of a square that the pipeline makes one token's channels of, before
    the model's own patches."""
    guidance_key: str = ""
    """Key of the trained component's configuration that says whether the model is told a guidance
    scale, because it was distilled from guidance. "": no model of the family is."""
    negative_prompts: bool = True  # the pipeline's guidance needs a negative prompt
    trainable_encoders: tuple[str, ...] = ()
    """Those of `text_encoders` that may be trained beside the model: CLIPs, which are small and
    whose whole output goes into the model. (T5 and language models are larger than what they
    speak to; nobody trains them with it.)"""
    embedding_keys: Mapping[str, str] = field(factory=dict)
    """Encoders that can be given new tokens (textual inversion), and what a file calls the vectors
    of each; "": by the token itself, as where there is one encoder. Empty: the pipeline has no
    `load_textual_inversion`."""
    kohya_encoders: Mapping[str, str] = field(factory=dict)
    """What sd-scripts call the text encoders that can be trained, in a LoRA (networks/lora.py,
    lora_sd3.py, lora_flux.py). ComfyUI reads these and Diffusers' names (comfy/lora.py,
    model_lora_keys_clip)."""
    few_steps_key: str = ""
    """Key of model_index.json that says that a base was distilled into a few steps, and that the
    pipeline then takes no notice of a guidance scale. "": no model of the family was."""
    few_steps: int = 0  # what one samples such a base with
    guidance_argument: Literal["guidance_scale", "true_cfg_scale"] = "guidance_scale"
    """What the pipeline calls its guidance. It turns `true_cfg_scale` on only where it is given a
    negative prompt, be it an empty one."""
    patch_key: str = "patch_size"
    """Key of the trained component's configuration for latents along the edge of one of its
    patches; of several sizes, the first is used."""
    lora_loader: Literal["pipeline", "peft"] = "pipeline"
    """What loads a LoRA: Diffusers' pipeline, or peft alone where that has no `load_lora_weights`.
    """
    not_compiled: str = ""  # why its blocks can't be compiled; "": they can
    cross_attention: tuple[str, ...] = ()
    """Attention modules, by the last parts of their names, whose keys and values are of another
    input than their queries: the prompt's."""
    whole_file: WholeFile | None = None
    """How its models lie in one file; None: they are published in folders only."""
    own_config: Callable[[Mapping[str, Any]], bool] | None = None
    """Whether a configuration of the trained component is of this family; None where no other
    family has its class."""

    def is_of(self, trained: Mapping[str, Any]) -> bool:
        """Whether a configuration of the trained component's class is of this family."""
        return self.own_config is None or self.own_config(trained)

    def multiple(self, configs: Configs) -> int:
        """Pixels that both edges must divide by: VAE down-sampling times patch size."""
        trained = configs[self.trained_component]
        if self.trained_component == "unet":  # halves its picture once less than it has levels
            step = 2 ** (len(trained["block_out_channels"]) - 1)
        else:
            step = self.patch(trained)
        return self.vae_factor(configs["vae"]) * int(step)

    def patch(self, transformer: Mapping[str, Any]) -> int:
        """Latents along the edge of one token, by the transformer's configuration."""
        stated = transformer.get(self.patch_key) or 1
        return int(stated[0] if isinstance(stated, list | tuple) else stated) * self.packed

    def told_guidance(self, trained: Mapping[str, Any]) -> bool:
        """Whether a model of this configuration is told a guidance scale."""
        return bool(self.guidance_key and trained.get(self.guidance_key))

    def vae_factor(self, vae: Mapping[str, Any]) -> int:
        """How many pixels one latent stands for, along an edge."""
        halvings = vae.get("temperal_downsample")  # of an autoencoder for videos too
        if halvings is not None:
            return int(2 ** len(halvings))
        blocks = vae.get("encoder_block_out_channels") or vae.get("block_out_channels")
        assert blocks is not None, "a vae configuration names its blocks"
        return int(2 ** (len(blocks) - 1))

    def shift(self, scheduler: Mapping[str, Any]) -> tuple[float, str]:
        """The flow shift and which key of the scheduler's configuration gave it.

        Published Sana folders hold a DPM-Solver configuration with `flow_shift`; a loader that
        reads `shift` alone loses it.
        """
        for key in ("flow_shift", "shift"):
            value = scheduler.get(key)
            if isinstance(value, int | float):
                return float(value), key
        return self.default_shift, ""

"""Every diagnostic code: what it means, how it comes about and what is right.

Codes are stable: scripts and editors rely on them. The examples are laid over a working recipe by
a test, so that each of them gives its code; a line that begins with `tuner` is a command line, and
a comment says what the files hold where the recipe alone does not show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Code(NamedTuple):
    """One kind of mistake."""

    title: str
    """A few words, for the list of all codes."""
    meaning: str
    """Why it is refused or warned of, in full sentences."""
    wrong: str
    right: str


CODES: Mapping[str, Code] = {
    "attention-unfit": Code(
        "a kernel that can't compute this attention",
        "Kernels are written for some devices and number formats. Some have no derivative, so they "
        "can draw pictures but not train; some take no mask, which models need whose prompts have "
        "different lengths.",
        '[launch]\ndevice = "cpu"\n[speed]\nattention = "flash"',
        '[launch]\ndevice = "cpu"\n[speed]\nattention = "native"',
    ),
    "bad-adapter": Code(
        "a file to start from that is no such adapter",
        "`from` names an adapter's file of the same kind and ranks, as a run leaves it. Its header "
        "tells; the message says what it is instead.",
        '[adapter]\nkind = "lora"\nfrom = "prompts.txt"',
        '[adapter]\nkind = "lora"',
    ),
    "bad-address": Code(
        "text that is no repository or address",
        "A repository of the hub is an owner and a name with a slash between. A webhook is told "
        "over https, because what it is told says what you train.",
        '[publish]\nhub = "my-model"',
        '[publish]\nhub = "me/my-model"',
    ),
    "bad-multiple": Code(
        "bucket edges that the model can't take",
        "The model works on patches of several pixels, so both edges of every bucket must be a "
        "multiple of that patch. `multiple` may only make them coarser.",
        "[data]\nmultiple = 20",
        "[data]\nmultiple = 64",
    ),
    "bad-name": Code(
        "a name that can't be a file name everywhere",
        "Runs, prompts and new words give their names to folders and files, also on other systems. "
        "Letters, digits, `.`, `_` and `-` work everywhere.",
        'name = "my run/1"',
        'name = "my-run-1"',
    ),
    "bad-override": Code(
        "a `--set` that is no key and value",
        "An override is a dotted key, `=` and a value, as the file would hold them. A value that "
        "is no TOML is taken as text.",
        "tuner plan recipe.toml --set train.epochs",
        "tuner plan recipe.toml --set train.epochs=4",
    ),
    "bad-path": Code(
        "a text that is no path",
        "The system can't make a path of it: a home folder of a user who does not exist, or a "
        "character that no file name may hold.",
        'output = "~no-such-user/runs"',
        'output = "runs"',
    ),
    "bad-pattern": Code(
        "targets that are neither a named set nor a pattern",
        "`targets` is the name of a set that the family offers, or a list of regular expressions "
        "that are matched against whole module names.",
        '[adapter]\nkind = "lora"\ntargets = ["attn(("]',
        '[adapter]\nkind = "lora"\ntargets = "attention"',
    ),
    "bad-prompts": Code(
        "a file of prompts that can't be read as one",
        "A file of validation prompts is TOML or JSON: one table of names and prompts.",
        '[validation]\nprompts = "prompts.txt"  # which holds lines of plain text',
        '[validation]\nprompts = { beach = "a dog on a beach" }',
    ),
    "bad-ratio": Code(
        "text that is no aspect ratio",
        "Buckets to choose from are aspect ratios, width before height. Their size in pixels "
        "follows from `resolution`.",
        '[data]\ncrop = { aspect = "closest", buckets = ["1024x768"] }',
        '[data]\ncrop = { aspect = "closest", buckets = ["4:3", "1:1"] }',
    ),
    "bad-size": Code(
        "a picture size that the model can't draw",
        "Both edges must be a multiple of the model's patch in pixels; the message names the "
        "nearest size that is.",
        '[validation]\nprompts = { beach = "a dog on a beach" }\nsizes = ["1001x1001"]',
        '[validation]\nprompts = { beach = "a dog on a beach" }\nsizes = ["1024x1024"]',
    ),
    "bad-unit": Code(
        "a quantity without its unit, or with a wrong one",
        "Sizes, shares and intervals are texts that carry their unit, so that 500 is never taken "
        "for epochs by one reader and for steps by another. A time is refused where only steps "
        "make a run repeat exactly.",
        "[checkpoints]\nevery = 500",
        '[checkpoints]\nevery = "500 steps"',
    ),
    "batch-too-large": Code(
        "a batch larger than the data",
        "No source can fill a batch of this size, so the run would not do what the recipe says. "
        "Repeats count: 10 images with `repeats = 5` are 50 samples. A small source beside one "
        "that fills batches is trained in short ones.",
        "[train]\nbatch_size = 500",
        "[train]\nbatch_size = 2",
    ),
    "bf16-trained": Code(
        "trained weights in bfloat16",
        "bfloat16 keeps 8 bits of a number, so an update much smaller than its weight is rounded "
        "away. Weights in float32 under bfloat16 arithmetic learn from every step.",
        '[precision]\ntrained = "bf16"',
        '[precision]\ntrained = "fp32"',
    ),
    "broken-captions": Code(
        "caption files that can't be read",
        "A caption file is UTF-8 text. The message names the files and what is wrong with each. "
        'With `broken = "skip"` their images are left out, and counted.',
        '[[data.source]]\npath = "latin1"  # with captions in another encoding than UTF-8',
        '[[data.source]]\npath = "captioned"  # with captions in UTF-8',
    ),
    "broken-images": Code(
        "files that are no usable image",
        "A file with the ending of an image is damaged, empty, or of another kind. Training "
        "would fail on it, or without it silently see fewer images than you count.",
        '[[data.source]]\npath = "damaged"  # which holds a half-copied picture',
        '[data]\nbroken = "skip"',
    ),
    "budget-too-large": Code(
        "a memory budget that the device does not have",
        "The plan is made to fit the budget. What is between the device and the budget is not "
        "there: the run would end for want of memory, or spill into the host's and crawl.",
        '[launch]\ndevice = "cpu"\n[memory]\nbudget = "900 TiB"',
        '[launch]\ndevice = "cpu"\n[memory]\nbudget = "8 GiB"',
    ),
    "captions-elsewhere": Code(
        "captions that this kind of source can't hold",
        "A column belongs to a table or a shard, a `.txt` or `.json` file lies beside an image in "
        "a folder or a tar.",
        '[[data.source]]\npath = "pictures"\ncaptions = { from = "column" }',
        '[[data.source]]\npath = "table.jsonl"\ncaptions = { from = "column" }',
    ),
    "conflict": Code(
        "two settings that exclude each other",
        "Both can't hold. Take one of them out.",
        "[train]\nepochs = 10\nsteps = 500",
        "[train]\nepochs = 10",
    ),
    "crop-too-large": Code(
        "a cut that is larger than the image",
        'With `resize = "none"` the bucket is cut out of the image at its own size, and an image '
        "that is smaller than the bucket can't give it.",
        '[data]\nresolution = 256  # with images of 64 pixels\ncrop = { resize = "none" }',
        '[data]\nresolution = 64\ncrop = { resize = "none" }',
    ),
    "data-not-apart": Code(
        "data and results in one folder",
        "Where a run or a cache lies in a data folder, its pictures would be trained on; where "
        "data lies in them, clearing them would delete it.",
        'output = "pictures"',
        'output = "runs"',
    ),
    "disk-full": Code(
        "more disk needed than is free",
        "Checkpoints, results, pictures and caches are larger than the disk's free space, or may "
        "become so (then it is a warning). This is about the machine, so the exit code is 3.",
        "[checkpoints]\nkeep = 0  # keeps all, on a disk that is nearly full",
        "[checkpoints]\nkeep = 2",
    ),
    "distilled-base": Code(
        "training a base that was distilled into few steps",
        "Such a base draws in a few steps what the model that it was made from draws in dozens. "
        "Training knows nothing of that and undoes it: the longer it goes on, the worse pictures "
        "in few steps become. Train the model that it was made from; most of its LoRAs can be "
        "loaded into the distilled one.",
        '[model]\nfamily = "flux"\nbase = "black-forest-labs/FLUX.1-schnell"',
        '[model]\nfamily = "flux"\nbase = "black-forest-labs/FLUX.1-dev"',
    ),
    "does-not-fit": Code(
        "more memory needed than the budget",
        "The simulated peak of the step is above the budget, with what the recipe allows to be "
        "recomputed. This is about the machine, not the recipe, so the exit code is 3.",
        '[memory]\nbudget = "2 GiB"',
        '[memory]\nbudget = "24 GiB"',
    ),
    "duplicate-id": Code(
        "two sources with one name",
        "The plan and the caches tell sources apart by their `id`.",
        '[[data.source]]\nid = "dog"\npath = "pictures"\n'
        '[[data.source]]\nid = "dog"\npath = "more"',
        '[[data.source]]\nid = "dog"\npath = "pictures"\n'
        '[[data.source]]\nid = "cat"\npath = "more"',
    ),
    "duplicate-key": Code(
        "a key or table given twice",
        "TOML allows each key once; which of the two values was meant can't be known.",
        "[train]\nbatch_size = 1\nbatch_size = 2",
        "[train]\nbatch_size = 2",
    ),
    "empty-prompt": Code(
        "validation without words",
        "A prompt without words draws what the model makes of nothing, and a table without "
        "prompts draws no picture at all.",
        '[validation]\nprompts = { beach = "" }',
        '[validation]\nprompts = { beach = "a dog on a beach" }',
    ),
    "extends-circle": Code(
        "a recipe that extends itself",
        "Following `extends` comes back to a recipe that was read already, or never ends.",
        'extends = "subject.toml"  # in subject.toml',
        'extends = "recipe.toml"',
    ),
    "file-too-large": Code(
        "a recipe too large to be one",
        "A recipe is a few kilobytes. A file of megabytes is something else.",
        "tuner plan weights.toml  # of 9 MiB",
        "tuner plan recipe.toml",
    ),
    "fitted-times": Code(
        "a teacher that takes other times than its student will",
        "Few-step models take times from 0 to 1, ordinary Sana from 0 to 1000. The student's "
        "embedding of times is fitted to the base's by least squares; what is rough in it is lost. "
        "The published Sprint teachers were trained on times up to 1.",
        "[sprint]",
        "",
    ),
    "fp16-cache": Code(
        "a cache in float16 of a family that overflows",
        "What its encoders make may exceed 65504, the largest float16 number. The run ends at the "
        "first prompt or picture of which that is so. bfloat16 has the range of float32, and takes "
        "as much room.",
        '[cache]\nprecision = "fp16"',
        '[cache]\nprecision = "bf16"',
    ),
    "fp16-overflow": Code(
        "float16 on a family that overflows",
        "Activations of this family exceed 65504, the largest float16 number; the loss becomes "
        "infinite. bfloat16 has the range of float32.",
        '[precision]\ncompute = "fp16"',
        '[precision]\ncompute = "bf16"',
    ),
    "fp16-trained": Code(
        "trained weights in float16",
        "Updates below 6e-8 are zero in float16, so training stalls. `compute` may be float16: "
        "weights are then trained in float32, and the loss is scaled.",
        '[precision]\ntrained = "fp16"',
        '[precision]\ntrained = "fp32"',
    ),
    "fused-backward": Code(
        "a backward pass that can't update as it goes",
        "With `fused_backward` each weight is updated as soon as its own gradient is complete, and "
        "that gradient is dropped. What needs all gradients at once can't go with it: clipping by "
        "the global norm, accumulation over batches, some optimizers.",
        "[memory]\nfused_backward = true\n[train]\nmax_grad_norm = 1.0",
        "[memory]\nfused_backward = true\n[train]\nmax_grad_norm = 0.0",
    ),
    "holdout-leak": Code(
        "images held out by one source and trained by another",
        "A measure on such images would say nothing: the model has seen them. Sources of one "
        "folder with one `holdout` hold out the same images.",
        '[[data.source]]\npath = "captioned"\nholdout = 1\n[[data.source]]\nid = "again"\n'
        'path = "captioned"',
        '[[data.source]]\npath = "captioned"\nholdout = 1\n[[data.source]]\nid = "again"\n'
        'path = "captioned"\nholdout = 1',
    ),
    "holdout-too-large": Code(
        "all images held out",
        "What is held out is not trained on, and here nothing else is left.",
        '[[data.source]]\npath = "captioned"\nholdout = 4  # of 4 images',
        '[[data.source]]\npath = "captioned"\nholdout = 1',
    ),
    "host-too-small": Code(
        "more host memory needed than the machine has",
        "What waits for the device (blocks, activations, an average), encoders while they are read "
        "and the copy that a checkpoint is written from lie in host memory. With `--device` the "
        "other machine is taken to have 32 GiB, or twice the device's memory if that is more.",
        "[memory.offload]\nactivations = true  # more of them than the host has memory",
        "[memory.offload]\nactivations = false",
    ),
    "idle-devices": Code(
        "more devices than batches",
        "Each device takes whole batches. An epoch that has fewer of them than there are devices "
        "leaves some without work in every step.",
        "[launch]\ndevices = 64",
        "[launch]\ndevices = 2",
    ),
    "interval-too-long": Code(
        "an interval longer than the run",
        "Nothing happens before the run ends, so a run that is killed has nothing to go on from, "
        "and no picture tells how it goes.",
        '[train]\nepochs = 2\n[checkpoints]\nevery = "5000 steps"',
        '[train]\nepochs = 2\n[checkpoints]\nevery = "1 epoch"',
    ),
    "invalid-toml": Code(
        "text that is no TOML",
        "The file can't be read as TOML from the marked place on. Text needs quotes, a key and "
        "its value are joined by `=`, a table's name stands in brackets.",
        "name = my run",
        'name = "my-run"',
    ),
    "long-warmup": Code(
        "a warm-up as long as the run",
        "The learning rate rises until the run ends, so only the last step is trained at `lr` and "
        "the schedule never falls.",
        '[train.schedule]\nname = "cosine"\nwarmup = "100%"',
        '[train.schedule]\nname = "cosine"\nwarmup = "10%"',
    ),
    "mask-size": Code(
        "a mask of another size than its image",
        "A mask is cut and scaled as its image is, so both must have the same width and height.",
        '[[data.source]]\npath = "pictures"\ncaptions = { from = "instance", prompt = "a dog" }\n'
        'mask = { from = "file", folder = "small" }  # of half the size',
        '[[data.source]]\npath = "pictures"\ncaptions = { from = "instance", prompt = "a dog" }\n'
        'mask = { from = "file", folder = "masks" }',
    ),
    "missing-captions": Code(
        "images without a caption",
        'With `from = "textfile"` each image needs a .txt file of its name that is not empty. '
        "Choose another origin for captions, or say what to do with such images.",
        '[[data.source]]\npath = "pictures"  # without .txt files',
        '[[data.source]]\npath = "pictures"\n'
        'captions = { from = "instance", prompt = "a photo of sks dog" }',
    ),
    "missing-key": Code(
        "a key that must be given",
        "There is no default that would be right for everyone.",
        "[adapter]\nrank = 8",
        '[adapter]\nkind = "lora"\nrank = 8',
    ),
    "missing-masks": Code(
        "images without a mask of their own",
        "A mask is a picture of the same name in the folder of masks, or with a suffix beside the "
        "image. An image needs exactly one.",
        '[[data.source]]\npath = "pictures"\ncaptions = { from = "instance", prompt = "a dog" }\n'
        'mask = { from = "file", suffix = "-mask" }  # of which there are none',
        '[[data.source]]\npath = "pictures"\ncaptions = { from = "instance", prompt = "a dog" }\n'
        'mask = { from = "alpha" }',
    ),
    "missing-package": Code(
        "something the recipe asks for whose package is not here",
        "The recipe is right and plans everywhere, but it can't be run on this machine before what "
        "it needs is there.",
        '[train.optimizer]\nname = "lion"  # without the package torch-optimi',
        '[train.optimizer]\nname = "adamw"',
    ),
    "missing-path": Code(
        "a file or folder that does not exist",
        "Paths are relative to the recipe, not to where the command is run.",
        '[[data.source]]\npath = "no-such-folder"',
        '[[data.source]]\npath = "pictures"',
    ),
    "missing-token": Code(
        "a result to publish, and no token to do so",
        "The hub takes uploads from those it knows. Log in once with `hf auth login`, or set "
        "HF_TOKEN; a token never stands in a recipe.",
        '[publish]\nhub = "me/my-model"  # without a token on this machine',
        '[publish]\nhub = ""',
    ),
    "model-refused": Code(
        "a model that can't be built or trained this way",
        "The simulated step could not be made: the configuration is none that the library takes, "
        "or the targets match no layer. The message is the reason it gave.",
        '[adapter]\nkind = "lora"\ntargets = ["no_such_layer"]',
        '[adapter]\nkind = "lora"\ntargets = "attention"',
    ),
    "needs-variants": Code(
        "tags that change from use to use under cached embeddings",
        "Text embeddings are computed once and cached, so a caption can't be shuffled each time it "
        "is used. With `variants` so many shuffled forms of it are cached, and each use draws one.",
        '[[data.source]]\npath = "captioned"\ncaptions = { shuffle = true }',
        '[[data.source]]\npath = "captioned"\ncaptions = { shuffle = true, variants = 8 }',
    ),
    "nested-too-deep": Code(
        "tables and arrays nested beyond reason",
        "No part of a recipe is nested more than a few levels.",
        "seed = " + "[" * 33 + "]" * 33,
        "seed = 7",
    ),
    "no-effect": Code(
        "a setting without effect",
        "Something else in the recipe makes this setting mean nothing. It is refused instead of "
        "ignored, because whoever wrote it expects it to matter.",
        '[train]\nschedule = { name = "constant", power = 2.0 }',
        '[train]\nschedule = { name = "polynomial", power = 2.0 }',
    ),
    "no-images": Code(
        "a source without a usable image",
        "The folder is empty, holds other files, or every image in it was skipped.",
        '[[data.source]]\npath = "empty"  # a folder without images',
        '[[data.source]]\npath = "pictures"',
    ),
    "no-such-component": Code(
        "a component that the family does not have",
        "Families are made of different parts: one has one text encoder, another three. The "
        "message lists those of the recipe's family.",
        '[model.text_encoder_3]\nquantize = "int8"',
        '[model.text_encoder]\nquantize = "int8"',
    ),
    "no-such-entry": Code(
        "a `--set` that reaches for nothing",
        "An override may reach into an array that the recipe holds: entries count from 0.",
        "tuner plan recipe.toml --set data.source[3].repeats=2",
        "tuner plan recipe.toml --set data.source[0].repeats=2",
    ),
    "no-such-file": Code(
        "a recipe that is not there",
        "There is no file of this name, seen from the folder where the command runs.",
        "tuner plan recpie.toml",
        "tuner plan recipe.toml",
    ),
    "no-targets": Code(
        "an adapter on nothing",
        "An empty list of targets adapts no layer, so nothing would be trained.",
        '[adapter]\nkind = "lora"\ntargets = []',
        '[adapter]\nkind = "lora"\ntargets = "attention"',
    ),
    "no-trigger": Code(
        "captions that do not say the trigger word",
        "What is learned is called up later by its trigger word. A caption that does not say it "
        "ties its image to other words; the message names some of them.",
        '[[data.source]]\npath = "captioned"\ncaptions = { trigger = "k4s4" }',
        '[[data.source]]\npath = "captioned"\ncaptions = { trigger = "k4s4", prefix = "k4s4," }',
    ),
    "not-a-file": Code(
        "a folder or device where a recipe is needed",
        "The command takes one recipe file.",
        "tuner plan .",
        "tuner plan recipe.toml",
    ),
    "not-a-pipeline": Code(
        "a base that is no whole pipeline folder",
        "A base folder has the Diffusers layout: model_index.json and a folder for each "
        "component, as `save_pretrained` writes it. A base file holds a whole model as its "
        "publishers lay it out, in safetensors, not quantised.",
        '[model]\nbase = "pictures"',
        '[model]\nbase = "base"',
    ),
    "not-downloaded": Code(
        "data that lie elsewhere and have not been copied yet",
        "A plan opens no connection. `tuner run` copies what the recipe names into the cache "
        "folder, once, and makes the plan from the copy.",
        '[[data.source]]\npath = "hub:owner/name"',
        '[[data.source]]\npath = "captioned"',
    ),
    "not-in-family": Code(
        "something that the base's family does not have",
        "The setting is right for other models. What it stands for is not defined for this one, or "
        "its pipeline draws pictures without it, so that training with it would miss them.",
        '[train]\nloss = { weighting = "min-snr" }  # of a base that predicts a velocity',
        '[train]\nloss = { weighting = "none" }',
    ),
    "not-sharded": Code(
        "weights that can't be dealt out over the devices",
        'Under strategy "fsdp" each device holds some rows of every weight and updates them alone; '
        '"deepspeed" deals out pieces of them. What reads whole weights, or keeps them in another '
        "place or form, can't go with it.",
        '[launch]\ndevices = 2\nstrategy = "fsdp"\n[train.optimizer]\nname = "adafactor"',
        '[launch]\ndevices = 2\nstrategy = "fsdp"\n[train.optimizer]\nname = "adamw"',
    ),
    "not-streamed": Code(
        "a source that can't be read in parts",
        "Streaming lists what a shard holds and later fetches single images out of it. That needs "
        "plain tars or Parquet shards with the images inside: what is compressed as a whole has to "
        "be read from its beginning, and of single files nothing is gained.",
        '[[data.source]]\npath = "https://example.org/pictures.tar.gz"\nstreaming = true',
        '[[data.source]]\npath = "https://example.org/pictures.tar.gz"',
    ),
    "old-key": Code(
        "a key of an older recipe language",
        "The key was renamed. It still works in a recipe of that `schema`; rename it and raise "
        "`schema` to be rid of the warning.",
        "schema = 1  # with a key that schema 2 has renamed",
        "schema = 2",
    ),
    "opaque-images": Code(
        "masks by transparency, and no transparent image",
        'With `from = "alpha"` what is opaque is learned. The headers of these images leave no '
        "room for transparency, so all of each is learned, as without a mask.",
        '[data.mask]\nfrom = "alpha"  # with images that are opaque',
        '[data.mask]\nfrom = "file"\nfolder = "masks"',
    ),
    "optimizer-device": Code(
        "an optimizer that does not run on the device",
        "Its kernels exist for other devices only. The reference lists where each optimizer runs.",
        '[launch]\ndevice = "cpu"\n[train.optimizer]\nname = "bnb-adamw-8bit"',
        '[launch]\ndevice = "cpu"\n[train.optimizer]\nname = "adamw-8bit"',
    ),
    "optimizer-precision": Code(
        "an optimizer for other weights than these",
        "It exists to train weights of another number format than the recipe trains.",
        '[precision]\ntrained = "fp32"\n[train.optimizer]\nname = "adamw-bf16"',
        '[precision]\ntrained = "bf16"\n[train.optimizer]\nname = "adamw-bf16"',
    ),
    "out-of-aspect": Code(
        "images of a shape that the recipe rules out",
        "They are skipped, as `min_aspect` and `max_aspect` ask. The message counts and names "
        "them.",
        '[[data.source]]\npath = "mixed"  # four squares and one panorama\nmax_aspect = 2\n'
        'captions = { from = "instance", prompt = "a photo" }',
        '[[data.source]]\npath = "mixed"\nmax_aspect = 4\n'
        'captions = { from = "instance", prompt = "a photo" }',
    ),
    "out-of-range": Code(
        "a number outside of its bounds",
        "The label says what is allowed. NaN, infinity and numbers beyond 64 bits are refused "
        "everywhere.",
        "[train.optimizer]\nlr = -1.0",
        "[train.optimizer]\nlr = 1e-4",
    ),
    "precision-mismatch": Code(
        "a frozen base in another number format than the arithmetic",
        "Layers multiply numbers of one format. The frozen base must be held in the format that "
        "is computed in.",
        '[adapter]\nkind = "lora"\n[precision]\ncompute = "bf16"\nweights = "fp32"',
        '[adapter]\nkind = "lora"\n[precision]\ncompute = "bf16"\nweights = "bf16"',
    ),
    "quantised-training": Code(
        "a full fine-tune of quantised weights",
        "A quantised weight can only take one of a few values, and a step is much smaller than the "
        "distance between them. An adapter on top of quantised weights trains well.",
        '[model.transformer]\nquantize = "int8"',
        '[model.transformer]\nquantize = "int8"\n[adapter]\nkind = "lora"',
    ),
    "quantised-vae": Code(
        "a quantised autoencoder",
        "The autoencoder is small and made of convolutions that are not quantised, and an error in "
        "it is an error in every latent that is trained on.",
        '[model.vae]\nquantize = "int8"',
        '[model.vae]\nweights = "bf16"',
    ),
    "random-frozen": Code(
        "random weights that nothing trains",
        '`init = "random"` starts from fresh weights. That is of use only for the component that '
        "is trained, and only without an adapter.",
        '[model.text_encoder]\ninit = "random"',
        '[model.transformer]\ninit = "random"',
    ),
    "rank-by-noise": Code(
        "a LoRA whose rank other programs don't mask",
        "`min_rank` gives a LoRA less rank where there is more noise, in training and in the run's "
        "own pictures. Its file is an ordinary LoRA's, which has no place for that: a program that "
        "loads it has all ranks everywhere, those too that were not trained at such noise levels.",
        '[adapter]\nkind = "lora"\nmin_rank = 1',
        '[adapter]\nkind = "lora"',
    ),
    "schedule-too-long": Code(
        "a warm-up longer than the run",
        "The learning rate would never reach its peak. A share of the run always fits.",
        '[train]\nschedule = { name = "cosine", warmup = "5000 steps" }',
        '[train]\nschedule = { name = "cosine", warmup = "10%" }',
    ),
    "schema-too-new": Code(
        "a recipe of a later recipe language",
        "`schema` is the version of the language. A newer one may hold keys that this version "
        "would misread.",
        "schema = 99",
        "schema = 1",
    ),
    "several-splits": Code(
        "a data set of several splits, of which none is picked",
        "The names of shards or folders speak of training and of test or validation data. Which "
        "of them are trained on must be said, so that no test data are by chance.",
        '[[data.source]]\npath = "splits"  # with train.jsonl and test.jsonl\nformat = "table"',
        '[[data.source]]\npath = "splits"\nformat = "table"\nfiles = ["train*"]',
    ),
    "shift-differs": Code(
        "trained at another timestep shift than sampled",
        "The base's scheduler draws pictures at its own shift. Training at another one puts the "
        "effort at noise levels that sampling visits less.",
        "[train]\ntimesteps = { shift = 1.5 }",
        '[train]\ntimesteps = { shift = "auto" }',
    ),
    "single-file": Code(
        "a single file that leaves something open",
        "A file of weights holds no configuration. Shapes of its tensors tell which model it is "
        "made of, but not what a model predicts; and what the file lacks comes from that model.",
        '[model]\nfamily = "sd"\nbase = "v2.safetensors"  # which predicts noise or v',
        '[model]\nfamily = "sd"\nbase = "v2.safetensors"\n'
        'rest = "stabilityai/stable-diffusion-2-1"',
    ),
    "small-buckets": Code(
        "buckets that never fill a batch",
        "Images of a rare shape are trained in short batches. They are weighted by their samples "
        "and nothing is dropped, but such steps use the device poorly.",
        '[[data.source]]\npath = "mixed"  # four squares and one panorama\n'
        'captions = { from = "instance", prompt = "a photo" }',
        '[[data.source]]\npath = "mixed"\n'
        'captions = { from = "instance", prompt = "a photo" }\ncrop = { aspect = "square" }',
    ),
    "text-instruction": Code(
        "trained without the pipeline's instruction",
        "The family's pipeline puts an instruction before each prompt. A model trained without "
        "it sees other embeddings in training than when it draws.",
        "[text]\ninstruction = false",
        '[text]\ninstruction = "auto"',
    ),
    "text-length": Code(
        "trained with another prompt length than drawn with",
        "Prompts are padded or cut to this many tokens. The pipeline has its own number, so a "
        "trained model sees other embeddings when it draws.",
        "[text]\nmax_length = 77",
        '[text]\nmax_length = "auto"',
    ),
    "too-many": Code(
        "more mistakes than are shown",
        "Only the first 200 are shown. The others follow when these are mended.",
        "x1 = 1  # and hundreds of further unknown keys",
        'name = "my-run"',
    ),
    "too-small": Code(
        "images below `min_size`",
        "They are skipped, as the recipe asks. The message counts and names them.",
        "[data]\nmin_size = 512  # above the size of the images",
        "[data]\nmin_size = 0",
    ),
    "uneven-rounding": Code(
        "small buckets that give a source more samples than was said",
        "Each bucket's share of an epoch is made whole by rounding it up. Where buckets are many "
        "and small, that adds up: the source is seen more often, beside others, than its "
        "`repeats` or `weight` say.",
        '[[data.source]]\npath = "mixed"  # four squares and one panorama\n'
        'captions = { from = "instance", prompt = "a photo" }\nrepeats = 1.2',
        '[[data.source]]\npath = "mixed"\n'
        'captions = { from = "instance", prompt = "a photo" }\nrepeats = 1.2\n'
        'crop = { aspect = "square" }',
    ),
    "unknown-key": Code(
        "a key that the recipe language does not have",
        "A misspelt key that was ignored would train something else than you think.",
        '[adapter]\nkind = "lora"\nrnk = 8',
        '[adapter]\nkind = "lora"\nrank = 8',
    ),
    "unknown-model": Code(
        "a base that is neither here nor known",
        "Published bases whose configuration we carry plan without a download. Any other one "
        "must be a folder on this machine.",
        '[model]\nbase = "someone/something"',
        '[model]\nbase = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"',
    ),
    "unknown-preset": Code(
        "a preset that is not shipped",
        "Presets are named by what they fit; the message lists them.",
        'extends = "preset:sana-1.6b-lora-1g"',
        'extends = "preset:sana-1.6b-lora-12g"',
    ),
    "unknown-value": Code(
        "a word that is none of the choices",
        "The key takes one of a few words; the message names the nearest, or all.",
        '[train]\ntimesteps = { sampling = "gaussian" }',
        '[train]\ntimesteps = { sampling = "logit-normal" }',
    ),
    "unreadable-file": Code(
        "a recipe that the system won't let us read",
        "The file is there but can't be opened: permissions, a failing disk, a name that no "
        "file can have.",
        "tuner plan recipe.toml  # with permissions for nobody",
        "tuner plan recipe.toml",
    ),
    "unreadable-folder": Code(
        "a data folder that the system won't let us read",
        "The folder is there but its entries can't be listed.",
        '[[data.source]]\npath = "pictures"  # with permissions for nobody',
        '[[data.source]]\npath = "pictures"',
    ),
    "unreadable-source": Code(
        "a source of images that can't be read as it is",
        "The file is of no format that is read, or a folder holds several formats. The message "
        "says which.",
        '[[data.source]]\npath = "latin1.csv"  # a table in another encoding than UTF-8',
        '[[data.source]]\npath = "table.jsonl"',
    ),
    "unusual-lr": Code(
        "a learning rate that the optimizer is not used with",
        "Adam and its kin move a weight by about the learning rate in each step, and weights are "
        "mostly below 0.1. Prodigy finds the size of its steps itself and multiplies it by `lr`, "
        "which is about 1.",
        '[train.optimizer]\nname = "prodigy"\nlr = 1e-4',
        '[train.optimizer]\nname = "prodigy"\nlr = 1.0',
    ),
    "unusual-size": Code(
        "a picture size that the model was not made for",
        "Models draw well near the size and shape that they saw in training. At twice or half of "
        "it, or very wide or tall, they repeat things or leave them out.",
        '[validation]\nprompts = { beach = "a dog on a beach" }\nsizes = ["2048x2048"]',
        '[validation]\nprompts = { beach = "a dog on a beach" }\nsizes = ["64x64"]',
    ),
    "unwritable-output": Code(
        "a folder that can't be written",
        "Where the run or the caches would be written, there is a file, or no permission. It is "
        "told now instead of after the first hour.",
        'output = "recipe.toml"',
        'output = "runs"',
    ),
    "upscaled": Code(
        "images smaller than their bucket",
        "They are enlarged, and the model learns their blur. Lower the resolution, or skip them "
        "with `min_size`.",
        "[data]\nresolution = 256  # with images of 64 pixels",
        "[data]\nresolution = 64",
    ),
    "wrong-column": Code(
        "a column that is not there, or holds something else",
        "Images and captions of a table or a shard stand in columns. The message lists the "
        "columns there are.",
        '[[data.source]]\npath = "table.jsonl"\ncaptions = { from = "column", column = "words" }',
        '[[data.source]]\npath = "table.jsonl"\ncaptions = { from = "column", column = "text" }',
    ),
    "wrong-encoding": Code(
        "a recipe that is not UTF-8",
        "TOML is UTF-8 by definition. Save the file as UTF-8 in your editor.",
        "tuner plan recipe.toml  # saved as UTF-16",
        "tuner plan recipe.toml",
    ),
    "wrong-family": Code(
        "a base of another family",
        "The base's model_index.json names a pipeline of another family than the recipe, or its "
        "tensors have the names and shapes of one.",
        '[model]\nfamily = "sd3"\nbase = "base"  # which is a Sana pipeline',
        '[model]\nfamily = "sana"\nbase = "base"',
    ),
    "wrong-type": Code(
        "a value of the wrong kind",
        "Nothing is converted silently: text is not a number, a number is not true or false.",
        '[train]\nbatch_size = "2"',
        "[train]\nbatch_size = 2",
    ),
}

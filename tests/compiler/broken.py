"""Broken recipes: what is changed in a good one, and the place and code of the one complaint.

Each row: (what stands in the good recipe, what stands there instead, the text that the caret must
mark, the code, words that the message or its help must hold). An empty first text puts the second
before the recipe's first line.
"""

from __future__ import annotations

Row = tuple[str, str, str, str, str]

GOOD = """\
schema = 1
name = "try"
seed = 3
output = "runs"

[model]
family = "sana"
base = "base"

[adapter]
kind = "lora"
rank = 4
alpha = 8.0
dropout = 0.1
targets = "attention"

[memory]
budget = "9 GiB"
activation_checkpointing = "auto"

[precision]
compute = "bf16"

[data]
resolution = 64
crop = { style = "center", aspect = "preserve" }
min_size = 8
broken = "error"
[[data.source]]
id = "one"
path = "pictures"
repeats = 1.5
captions = { from = "instance", prompt = "a photo of sks dog" }

[train]
epochs = 4
batch_size = 2
accumulate = 2
max_grad_norm = 0.5
optimizer = { name = "adamw", lr = 1e-4, betas = [0.9, 0.99], weight_decay = 0.1 }
schedule = { name = "cosine", warmup = "10%", end = 0.1 }
timesteps = { sampling = "logit-normal", mean = 0.0, std = 1.0 }
ema = { decay = 0.99, device = "cpu", every = "2 steps" }

[checkpoints]
every = "1 epoch"
keep = 2

[validation]
every = "5 steps"
prompts = { a = "a dog" }
sizes = ["64x64"]
guidance = 4.5
steps = 3
at_start = true

[track]
to = ["tensorboard"]
[launch]
device = "cpu"
"""

TYPOS: tuple[Row, ...] = (
    ("rank = 4", "rnk = 4", "rnk", "unknown-key", "rank"),
    ("rank = 4", "Rank = 4", "Rank", "unknown-key", "rank"),
    ("rank = 4", "lora_rank = 4", "lora_rank", "unknown-key", "rank"),
    ("rank = 4", "dim = 4", "dim", "unknown-key", "adapter"),
    ("[adapter]", "[adaptor]", "adaptor", "unknown-key", "adapter"),
    ("[train]", "[training]", "training", "unknown-key", "train"),
    ("[model]", "[modle]", "modle", "unknown-key", "model"),
    ("[[data.source]]", "[[data.sources]]", "sources", "unknown-key", "source"),
    ("[[data.source]]", "[[dataset]]", "dataset", "unknown-key", "data"),
    ("[[data.source]]", "[data.source]", "[data.source]", "wrong-type", "[[data.source]]"),
    ("epochs = 4", "epoch = 4", "epoch", "unknown-key", "epochs"),
    ("epochs = 4", "num_train_epochs = 4", "num_train_epochs", "unknown-key", "train.epochs"),
    ("epochs = 4", "max_train_steps = 4", "max_train_steps", "unknown-key", "train.steps"),
    ("batch_size = 2", "batchsize = 2", "batchsize", "unknown-key", "batch_size"),
    ("batch_size = 2", "batch-size = 2", "batch-size", "unknown-key", "batch_size"),
    ("batch_size = 2", "train_batch_size = 2", "train_batch_size", "unknown-key", "batch_size"),
    (
        "accumulate = 2",
        "gradient_accumulation_steps = 2",
        "gradient_accumulation_steps",
        "unknown-key",
        "train.accumulate",
    ),
    ("lr = 1e-4", "learning_rate = 1e-4", "learning_rate", "unknown-key", "lr"),
    ("max_grad_norm", "max_gard_norm", "max_gard_norm", "unknown-key", "max_grad_norm"),
    ("warmup", "warm_up", "warm_up", "unknown-key", "warmup"),
    ("seed = 3", "sead = 3", "sead", "unknown-key", "seed"),
    ("keep = 2", "keeps = 2", "keeps", "unknown-key", "keep"),
    ("keep = 2", "checkpoints_total_limit = 2", "checkpoints_total_limit", "unknown-key", "keep"),
    ("prompts =", "prompt =", "prompt", "unknown-key", "prompts"),
    ("prompts =", "validation_prompts =", "validation_prompts", "unknown-key", "prompts"),
    ("guidance = 4.5", "cfg = 4.5", "cfg", "unknown-key", "validation"),
    ('device = "cpu"\n', "gpu = 0\n", "gpu", "unknown-key", "launch"),
    ("compute =", "mixed_precision =", "mixed_precision", "unknown-key", "compute"),
    (
        "activation_checkpointing",
        "gradient_checkpointing",
        "gradient_checkpointing",
        "unknown-key",
        "activation_checkpointing",
    ),
    ("style =", "crop_style =", "crop_style", "unknown-key", "style"),
    ("from =", "source =", "source", "unknown-key", "from"),
    ("", "train.lr = 1e-4\n", "train", "duplicate-key", ""),
    ("[launch]", '[speed]\ncomplie = "off"\n[launch]', "complie", "unknown-key", "compile"),
    ("[launch]", "[speeds]\ntf32 = true\n[launch]", "speeds", "unknown-key", "speed"),
    ("keep = 2", 'keep = 2\nkeep_evry = "2 epochs"', "keep_evry", "unknown-key", "keep_every"),
    ("accumulate = 2", "noise_offset = 0.1", "noise_offset", "unknown-key", "train.noise.offset"),
    (
        "accumulate = 2",
        "train_text_encoder = true",
        "train_text_encoder",
        "unknown-key",
        "train.text_encoders",
    ),
    (
        "repeats = 1.5",
        "regularization = {}",
        "regularization",
        "unknown-key",
        "regularisation",
    ),
    ("repeats = 1.5", "evaluation = {}", "evaluation", "unknown-key", "`holdout`"),
    ("repeats = 1.5", "launch = {}", "launch", "unknown-key", "`[launch]` is a table of its own"),
    ("repeats = 1.5", 'mask = { form = "alpha" }', "form", "unknown-key", "from"),
    (
        'base = "base"',
        'base = "base"\nquantize = "int8"',
        "quantize",
        "unknown-key",
        "model.transformer.quantize",
    ),
    ('to = ["tensorboard"]', 'api_key = "x"', "api_key", "unknown-key", "WANDB_API_KEY"),
    ("[launch]", '[publish]\ntoken = "x"\n[launch]', "token", "unknown-key", "no secrets"),
    ("rank = 4", "blocks_to_swap = 4", "blocks_to_swap", "unknown-key", "memory.offload.blocks"),
)

VALUES: tuple[Row, ...] = (
    ('family = "sana"', 'family = "sanna"', '"sanna"', "unknown-value", "sana"),
    ('family = "sana"', 'family = "Sana"', '"Sana"', "unknown-value", "sana"),
    ('kind = "lora"', 'kind = "lroa"', '"lroa"', "unknown-value", "lora"),
    ('kind = "lora"', 'kind = "LoRA"', '"LoRA"', "unknown-value", "lora"),
    ('compute = "bf16"', 'compute = "bfloat16"', '"bfloat16"', "unknown-value", "bf16"),
    ('compute = "bf16"', 'compute = "fp8"', '"fp8"', "unknown-value", "fp16"),
    ('name = "adamw"', 'name = "adamv"', '"adamv"', "unknown-value", "adamw"),
    ('name = "cosine"', 'name = "cosin"', '"cosin"', "unknown-value", "cosine"),
    ('"logit-normal"', '"logit_normal"', '"logit_normal"', "unknown-value", "logit-normal"),
    ('"logit-normal"', '"sigmoid"', '"sigmoid"', "unknown-value", "uniform"),
    ('style = "center"', 'style = "centre"', '"centre"', "unknown-value", "center"),
    ('aspect = "preserve"', 'aspect = "keep"', '"keep"', "unknown-value", "preserve"),
    (
        'from = "instance"',
        'from = "instanceprompt"',
        '"instanceprompt"',
        "unknown-value",
        "instance",
    ),
    ('broken = "error"', 'broken = "ignore"', '"ignore"', "unknown-value", "skip"),
    ('to = ["tensorboard"]', 'to = ["tensorbord"]', '"tensorbord"', "unknown-value", "tensorboard"),
    ('device = "cpu"\n', 'device = "gpu"\n', '"gpu"', "unknown-value", "cuda"),
    ('device = "cpu", every', 'device = "gpu", every', '"gpu"', "unknown-value", "same"),
    ('targets = "attention"', 'targets = "attn(("', '"attn(("', "bad-pattern", "attention"),
    ('targets = "attention"', "targets = []", "[]", "no-targets", ""),
    ('prompts = { a = "a dog" }', 'prompts = "nothing.toml"', '"nothing.toml"', "missing-path", ""),
    ('base = "base"', 'base = "bsae"', '"bsae"', "missing-path", "relative to the recipe"),
    ('base = "base"', 'base = "someone/else"', '"someone/else"', "unknown-model", "--local-dir"),
    ('base = "base"', 'base = "pictures"', '"pictures"', "not-a-pipeline", "model_index.json"),
    ('base = "base"', 'base = "recipe.toml"', '"recipe.toml"', "not-a-pipeline", "folder"),
    ('base = "base"', 'base = ""', '""', "not-a-pipeline", ""),
    ('path = "pictures"', 'path = "pictuers"', '"pictuers"', "missing-path", "relative"),
    ('path = "pictures"', 'path = "/no/such/folder"', '"/no/such/folder"', "missing-path", ""),
    ('path = "pictures"', 'path = "recipe.toml"', '"recipe.toml"', "missing-path", "a file"),
    ('path = "pictures"', 'path = "empty"', '"empty"', "no-images", "empty"),
    ('path = "pictures"', 'path = "damaged"', '"damaged"', "broken-images", 'broken = "skip"'),
    ('path = "pictures"', 'path = "~nobody-here/x"', '"~nobody-here/x"', "missing-path", ""),
    ('output = "runs"', 'output = "recipe.toml"', '"recipe.toml"', "unwritable-output", "file"),
    ('output = "runs"', 'output = "pictures"', '"pictures"', "data-not-apart", "output"),
    ('name = "try"', 'name = "a/b"', '"a/b"', "bad-name", "letters"),
    ('name = "try"', 'name = ""', '""', "bad-name", "letters"),
    ('name = "try"', 'name = ".."', '".."', "bad-name", "letters"),
    ('sizes = ["64x64"]', 'sizes = ["65x64"]', '"65x64"', "bad-size", "64x64"),
    ('sizes = ["64x64"]', 'sizes = ["64"]', '"64"', "bad-unit", "1024x768"),
    ('sizes = ["64x64"]', 'sizes = ["96 x 64"]', '"96 x 64"', "bad-unit", '"96x64"'),
    ('sizes = ["64x64"]', 'sizes = ["0x64"]', '"0x64"', "out-of-range", "8192"),
    ('sizes = ["64x64"]', 'sizes = ["64x64", "64x64"]', '"64x64"', "duplicate-id", "twice"),
    ('sizes = ["64x64"]', "sizes = []", "[]", "out-of-range", ""),
    ('kind = "lora"', 'kind = "locon"', '"locon"', "unknown-value", "lora"),
    ('family = "sana"', 'family = "sd15"', '"sd15"', "unknown-value", "`sd`"),
    ('family = "sana"', 'family = "wan"', '"wan"', "unknown-value", "`sdxl_refiner`"),
    (
        'base = "base"',
        'base = "stabilityai/stable-diffusion-3.5-large"',
        '"stabilityai/stable-diffusion-3.5-large"',
        "wrong-family",
        'family = "sd3"',
    ),
    (
        'base = "base"',
        'base = "https://huggingface.co/owner/name/tree/main"',
        '"https://huggingface.co/owner/name/tree/main"',
        "missing-path",
        'base = "owner/name"',
    ),
    ('name = "try"', 'name = "CON"', '"CON"', "bad-name", "Windows"),
    ('name = "try"', 'name = "try."', '"try."', "bad-name", "don't end"),
    ('path = "pictures"', 'path = ""', '""', "missing-path", 'path = "pictures"'),
    ('path = "pictures"', 'path = "$HOME/x"', '"$HOME/x"', "missing-path", "environment"),
    ('path = "pictures"', 'path = "pic*/*.tar"', '"pic*/*.tar"', "missing-path", "no file matches"),
    ('path = "pictures"', 'path = "me/dogs"', '"me/dogs"', "missing-path", '"hub:me/dogs"'),
    (
        'path = "pictures"',
        'path = "https://huggingface.co/datasets/me/dogs"',
        '"https://huggingface.co/datasets/me/dogs"',
        "bad-path",
        'path = "hub:me/dogs"',
    ),
    (
        'prompts = { a = "a dog" }',
        'prompts = "a dog"',
        '"a dog"',
        "missing-path",
        'first = "a dog"',
    ),
    ("rank = 4", 'rank = 4\nfrom = "x.safetensors"', '"x.safetensors"', "missing-path", "adapter"),
    (
        "[launch]",
        '[launch]\ndevices = 2\nstrategy = "zero3"',
        '"zero3"',
        "unknown-value",
        "deepspeed",
    ),
    (
        "steps = 3",
        'steps = 3\nscheduler = "euler_a"',
        '"euler_a"',
        "unknown-value",
        "euler-ancestral",
    ),
)

TYPES: tuple[Row, ...] = (
    ("rank = 4", 'rank = "4"', '"4"', "wrong-type", "rank = 4"),
    ("rank = 4", "rank = 4.0", "4.0", "wrong-type", "rank = 4"),
    ("rank = 4", "rank = true", "true", "wrong-type", "whole number"),
    ("rank = 4", "rank = [4]", "[4]", "wrong-type", "brackets"),
    ("rank = 4", "rank = { value = 4 }", "{ value = 4 }", "wrong-type", "whole number"),
    ("rank = 4", "rank = 2024-01-01", "2024-01-01", "wrong-type", "whole number"),
    ("at_start = true", 'at_start = "true"', '"true"', "wrong-type", "at_start = true"),
    ("at_start = true", 'at_start = "False"', '"False"', "wrong-type", "at_start = false"),
    ("at_start = true", "at_start = 1", "1", "wrong-type", "`true` or `false`"),
    ("at_start = true", "at_start = True", "True", "invalid-toml", "true"),
    ("lr = 1e-4", 'lr = "1e-4"', '"1e-4"', "wrong-type", "lr = 1e-4"),
    ("betas = [0.9, 0.99]", "betas = 0.9", "0.9", "wrong-type", "array"),
    ("betas = [0.9, 0.99]", "betas = [0.9]", "[0.9]", "out-of-range", "2"),
    ("betas = [0.9, 0.99]", 'betas = [0.9, "x"]', '"x"', "wrong-type", "number"),
    ('name = "try"', "name = 7", "7", "wrong-type", '"7"'),
    ('name = "try"', "name = my-run", "my-run", "invalid-toml", "quotes"),
    ('name = "try"', "name = 2024-05-01", "2024-05-01", "wrong-type", "2024-05-01"),
    ('path = "pictures"', "path = 3", "3", "wrong-type", "string"),
    (
        'captions = { from = "instance", prompt = "a photo of sks dog" }',
        'captions = "textfile"',
        '"textfile"',
        "wrong-type",
        "table",
    ),
    (
        'crop = { style = "center", aspect = "preserve" }',
        'crop = "center"',
        '"center"',
        "wrong-type",
        "table",
    ),
    ('sizes = ["64x64"]', "sizes = [64]", "64", "wrong-type", "string"),
    (
        'to = ["tensorboard"]',
        'to = "tensorboard"',
        '"tensorboard"',
        "wrong-type",
        '["tensorboard"]',
    ),
    ('prompts = { a = "a dog" }', "prompts = { a = 3 }", "3", "wrong-type", "string"),
    ('prompts = { a = "a dog" }', 'prompts = ["a dog"]', '["a dog"]', "wrong-type", "table"),
    ('every = "1 epoch"', "every = 500", "500", "bad-unit", "500 steps"),
    ('every = "1 epoch"', "every = true", "true", "wrong-type", ""),
    ('every = "1 epoch"', 'every = "500"', '"500"', "bad-unit", "500 steps"),
    ('every = "1 epoch"', 'every = "1 epcoh"', '"1 epcoh"', "bad-unit", "epoch"),
    ('every = "1 epoch"', 'every = "10 min"', '"10 min"', "bad-unit", "steps or epochs"),
    ('every = "1 epoch"', 'every = "-1 epoch"', '"-1 epoch"', "bad-unit", ""),
    ('every = "1 epoch"', 'every = ""', '""', "bad-unit", ""),
    ('budget = "9 GiB"', "budget = 9", "9", "bad-unit", "GiB"),
    ('budget = "9 GiB"', 'budget = "9"', '"9"', "bad-unit", "GiB"),
    ('budget = "9 GiB"', 'budget = "9 GB of memory"', '"9 GB of memory"', "bad-unit", "GiB"),
    ('budget = "9 GiB"', 'budget = "-1 GiB"', '"-1 GiB"', "bad-unit", ""),
    (
        'name = "cosine"',
        'name = "schedule_free"',
        '"schedule_free"',
        "unknown-value",
        "adamw-schedulefree",
    ),
    ('warmup = "10%"', "warmup = 100", "100", "bad-unit", "100 steps"),
    ('warmup = "10%"', 'warmup = "110%"', '"110%"', "bad-unit", "100%"),
    ('warmup = "10%"', 'warmup = "a tenth"', '"a tenth"', "bad-unit", "%"),
    ('every = "1 epoch"', 'every = "epoch"', '"epoch"', "bad-unit", "1 epoch"),
    ("[adapter]", "[[adapter]]", "adapter", "wrong-type", "[adapter]"),
    ("[launch]", "[speed]\ncompile = true\n[launch]", "true", "wrong-type", '"regional"'),
    ("[launch]", "[speed]\ncompile = false\n[launch]", "false", "wrong-type", '"off"'),
    ("repeats = 1.5", "regularisation = true", "true", "wrong-type", "regularisation = {}"),
    ("repeats = 1.5", "mask = true", "true", "wrong-type", 'mask = { from = "alpha" }'),
    ("repeats = 1.5", 'mask = "alpha"', '"alpha"', "unknown-value", '{ from = "alpha" }'),
    ("repeats = 1.5", 'crop = "center"', '"center"', "wrong-type", '{ style = "center" }'),
    ("accumulate = 2", 'loss = "huber"', '"huber"', "wrong-type", '{ kind = "huber" }'),
    ("accumulate = 2", "text_encoders = true", "true", "wrong-type", "text_encoders = {}"),
    (
        'activation_checkpointing = "auto"',
        "activation_checkpointing = false",
        "false",
        "wrong-type",
        '"off"',
    ),
    (
        "resolution = 64",
        'resolution = "1024x1024"',
        '"1024x1024"',
        "unknown-value",
        "resolution = 1024",
    ),
)

RANGES: tuple[Row, ...] = (
    ("rank = 4", "rank = 0", "0", "out-of-range", "between 1"),
    ("rank = 4", "rank = -4", "-4", "out-of-range", "between 1"),
    ("rank = 4", "rank = 99999999", "99999999", "out-of-range", "16384"),
    ("rank = 4", "rank = 99999999999999999999", "99999999999999999999", "out-of-range", "64 bits"),
    ("alpha = 8.0", "alpha = 0", "0", "out-of-range", "> 0"),
    ("alpha = 8.0", "alpha = nan", "nan", "out-of-range", "finite"),
    ("alpha = 8.0", "alpha = -inf", "-inf", "out-of-range", "finite"),
    ("dropout = 0.1", "dropout = 1.5", "1.5", "out-of-range", ">= 0 and < 1"),
    ("lr = 1e-4", "lr = 0", "0", "out-of-range", "> 0"),
    ("lr = 1e-4", "lr = -1e-4", "-1e-4", "out-of-range", "> 0"),
    ("lr = 1e-4", "lr = 1e999", "1e999", "out-of-range", "finite"),
    ("betas = [0.9, 0.99]", "betas = [0.9, 1.5]", "1.5", "out-of-range", "< 1"),
    ("weight_decay = 0.1", "weight_decay = -1", "-1", "out-of-range", ">= 0"),
    ("batch_size = 2", "batch_size = 0", "0", "out-of-range", "between 1"),
    ("batch_size = 2", "batch_size = 200", "200", "batch-too-large", "batch_size = 8"),
    ("accumulate = 2", "accumulate = 0", "0", "out-of-range", "between 1"),
    ("epochs = 4", "epochs = 0", "0", "out-of-range", "between 1"),
    ("seed = 3", "seed = -1", "-1", "out-of-range", "between 0"),
    ("seed = 3", "seed = 9223372036854775807", "9223372036854775807", "out-of-range", ""),
    ("schema = 1", "schema = 99", "99", "schema-too-new", ""),
    ("schema = 1", "schema = 0", "0", "out-of-range", "1"),
    ("resolution = 64", "resolution = 0", "0", "out-of-range", "> 0"),
    ("resolution = 64", "resolution = 4", "4", "out-of-range", "megapixels"),
    ("resolution = 64", "resolution = 100000", "100000", "out-of-range", "8192"),
    ("repeats = 1.5", "repeats = 0", "0", "out-of-range", "> 0"),
    ("repeats = 1.5", "repeats = -2", "-2", "out-of-range", "> 0"),
    ("min_size = 8", "min_size = -1", "-1", "out-of-range", "between 0"),
    ("decay = 0.99", "decay = 1.0", "1.0", "out-of-range", "< 1"),
    ("guidance = 4.5", "guidance = -1", "-1", "out-of-range", ">= 0"),
    ("steps = 3", "steps = 0", "0", "out-of-range", "between 1"),
    ("keep = 2", "keep = -1", "-1", "out-of-range", "between 0"),
    ("end = 0.1", "end = 2", "2", "out-of-range", "between 0 and 1"),
    ("std = 1.0", "std = 0.0", "0.0", "out-of-range", "> 0"),
    ("mean = 0.0", "mean = 200", "200", "out-of-range", "between -100 and 100"),
    ("alpha = 8.0", "alpha = 1e300", "1e300", "out-of-range", "beyond 1,000,000"),
    ("weight_decay = 0.1", "weight_decay = 1e30", "1e30", "out-of-range", "beyond 1,000,000"),
    ("guidance = 4.5", "guidance = 1e30", "1e30", "out-of-range", "beyond 1,000,000"),
    ("dropout = 0.1", "dropout = 1.0", "1.0", "out-of-range", "< 1"),
    ("repeats = 1.5", 'until = "1 epoch"', '"1 epoch"', "conflict", "epochs = 1"),
)

CONFLICTS: tuple[Row, ...] = (
    ("epochs = 4", "epochs = 4\nsteps = 9", "steps", "conflict", "leave one"),
    ("epochs = 4\n", "", "[train]", "missing-key", "epochs = 10"),
    ('compute = "bf16"', 'compute = "fp16"', '"fp16"', "fp16-overflow", "bf16"),
    ('compute = "bf16"', 'compute = "bf16"\ntrained = "fp16"', '"fp16"', "fp16-trained", "fp32"),
    (
        'compute = "bf16"',
        'compute = "bf16"\nweights = "fp32"',
        '"fp32"',
        "precision-mismatch",
        "leave `weights` out",
    ),
    ('warmup = "10%"', 'warmup = "500 steps"', '"500 steps"', "schedule-too-long", "10%"),
    ('name = "cosine"', 'name = "constant"', "end", "no-effect", ""),
    ('name = "cosine",', 'name = "linear", power = 2.0,', "power", "no-effect", "polynomial"),
    (
        'sampling = "logit-normal", mean = 0.0, std = 1.0',
        'sampling = "uniform", mean = 0.0',
        "mean",
        "no-effect",
        "logit-normal",
    ),
    ('name = "adamw"', 'name = "sgd"', "betas", "no-effect", "takes"),
    (
        'from = "instance", prompt = "a photo of sks dog"',
        'from = "instance"',
        '{ from = "instance" }',
        "missing-key",
        "sks dog",
    ),
    (
        'from = "instance",',
        'from = "filename", missing = "empty",',
        "prompt",
        "no-effect",
        "instance",
    ),
    (
        'from = "instance", prompt = "a photo of sks dog"',
        'from = "textfile"',
        '"pictures"',
        "missing-captions",
        ".txt",
    ),
    ('prompts = { a = "a dog" }\n', "", "every", "no-effect", "no validation prompts"),
    ('prompts = { a = "a dog" }', 'prompts = { "a b" = "a dog" }', '"a b"', "bad-name", "letters"),
    (
        'prompts = { a = "a dog" }',
        'prompts = { a = "x", g = { a = "y" } }',
        "a",
        "duplicate-id",
        "differ",
    ),
    ("guidance = 4.5", 'guidance = 1.0\nnegative = "ugly"', "negative", "no-effect", "above 1"),
    ("steps = 3", 'steps = 3\nscore = "clip"', '"clip"', "unknown-value", "shapes"),
    ('every = "2 steps"', 'every = "500 steps"', '"500 steps"', "no-effect", "never"),
    ("[launch]", '[launch]\ndevices = 1\nstrategy = "ddp"', "strategy", "no-effect", "one"),
    ("batch_size = 2", "batch_size = { 512 = 2 }", "{ 512 = 2 }", "missing-key", "64 = 1"),
    ("batch_size = 2", "batch_size = { 64 = 2, 512 = 2 }", "512", "no-effect", "64"),
    ('id = "one"', 'id = "one"\npath = "pictures"', "path", "duplicate-key", ""),
    (
        "[train]",
        '[[data.source]]\nid = "one"\npath = "more"\n'
        'captions = { from = "instance", prompt = "x" }\n[train]',
        '"one"',
        "duplicate-id",
        "differ",
    ),
    ("resolution = 64", "resolution = 64\nmultiple = 20", "20", "bad-multiple", "multiple = 16"),
    ("[train]", "[text]\nmax_length = 0\n[train]", "0", "out-of-range", "between 1"),
    (
        'base = "base"',
        'base = "base"\n[model.transformer]\ninit = "random"',
        '"random"',
        "conflict",
        "[adapter]",
    ),
    ('base = "base"', 'base = "base"\nrevision = "x"', "revision", "no-effect", "leave"),
    (
        'name = "adamw", lr = 1e-4, betas = [0.9, 0.99]',
        'name = "sgd", lr = 1e-2, momentum = 0.0, nesterov = true',
        "true",
        "conflict",
        "momentum = 0.9",
    ),
    (
        'prompts = { a = "a dog" }',
        'prompts = { a = "x", A = "y" }',
        "A",
        "duplicate-id",
        "where case does not count",
    ),
    ('prompts = { a = "a dog" }', 'prompts = { nul = "a dog" }', "nul", "bad-name", "nul-1"),
    (
        'budget = "9 GiB"',
        'budget = "9 GiB"\nfused_backward = true',
        "true",
        "fused-backward",
        "max_grad_norm = 0 and accumulate = 1",
    ),
    (
        'aspect = "preserve"',
        'aspect = "closest", buckets = ["1:1", "1:0"]',
        '"1:0"',
        "bad-ratio",
        "4:3",
    ),
    (
        "keep = 2\n\n",
        'keep = 2\nbest = "evaluation/loss"\n[evaluation]\nevery = "off"\n\n',
        '"evaluation/loss"',
        "no-effect",
        "[evaluation]",
    ),
)

SYNTAX: tuple[Row, ...] = (
    ("rank = 4", "rank 4", "rank 4", "invalid-toml", "="),
    ("rank = 4", "rank = ", "=", "invalid-toml", "value"),
    ("rank = 4", "rank: 4", ":", "invalid-toml", "="),
    ("rank = 4", "rank = 04", "04", "invalid-toml", "rank = 4"),
    ("rank = 4", "rank = 4 // four", "// four", "invalid-toml", "#"),
    ('name = "try"', 'name = "try', '"try', "invalid-toml", "not closed"),
    ('name = "try"', "name = 'try\"", "'try\"", "invalid-toml", "not closed"),
    ('name = "try"', 'name = "a\\qb"', "\\q", "invalid-toml", "escape"),
    ('name = "try"', 'name = "tr\\u12"', "\\u12", "invalid-toml", ""),
    ("[adapter]", "[adapter", "[adapter", "invalid-toml", "]"),
    ("[adapter]", "[]", "[]", "invalid-toml", ""),
    ("[adapter]", "adapter:", ":", "invalid-toml", ""),
    ("betas = [0.9, 0.99]", "betas = [0.9 0.99]", "0.99", "invalid-toml", ","),
    ("betas = [0.9, 0.99]", "betas = [0.9, 0.99", "weight_decay = 0.1", "invalid-toml", ""),
    ("rank = 4", "rank = null", "null", "invalid-toml", ""),
    ("rank = 4", "rank = None", "None", "invalid-toml", ""),
    ("rank = 4", "rank = 4\nrank = 8", "rank", "duplicate-key", ""),
    ("[track]", "[train]\nsteps = 3\n[track]", "train", "duplicate-key", ""),
    ("rank = 4", "rank = 4 alpha = 2", "alpha = 2", "invalid-toml", ""),
    ("seed = 3", "seed = " + "[" * 40 + "]" * 40, "[", "nested-too-deep", ""),
    ("schema = 1", 'extends = "nothing.toml"', '"nothing.toml"', "missing-path", ""),
    ("schema = 1", 'extends = "preset:nothing"', '"preset:nothing"', "unknown-preset", ""),
    ("schema = 1", 'extends = "recipe.toml"', '"recipe.toml"', "extends-circle", ""),
    (
        "schema = 1",
        'extends = "sana-1.6b-lora-12g"',
        '"sana-1.6b-lora-12g"',
        "missing-path",
        "preset:sana-1.6b-lora-12g",
    ),
    (
        "rank = 4",
        "<<<<<<< HEAD\nrank = 4\n=======\n>>>>>>> x",
        "<<<<<<<",
        "invalid-toml",
        "keep one",
    ),
    ("betas = [0.9, 0.99]", "betas = (0.9, 0.99)", "(0.9", "invalid-toml", "[...]"),
    ("lr = 1e-4,", "lr = 1,5e-4,", "1,5e-4", "invalid-toml", "1.5e-4"),
    ("rank = 4", "rank = \uff14", "\uff14", "invalid-toml", "rank = 4"),
    ("rank = 4", "rank: abc", ":", "invalid-toml", 'rank = "abc"'),
)

ROWS: tuple[Row, ...] = (*TYPOS, *VALUES, *TYPES, *RANGES, *CONFLICTS, *SYNTAX)

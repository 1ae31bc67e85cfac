"""Kinds of adapter: what each can be told, what it starts from, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compiler.adapters import ADAPTERS, LAYERED, alpha_of, described, rank_of, scale_of
from compiler.plan import Adapter, Ranked, Scaled
from tests.compiler.recipes import RECIPE, codes, compiled, project


def planned(tmp_path: Path, table: str) -> Adapter:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    result = compiled(project(folder, RECIPE + table))
    assert result.plan is not None and result.plan.adapter is not None, result.diagnostics
    return result.plan.adapter


def refused(tmp_path: Path, table: str, code: str) -> tuple[str, str]:
    result = compiled(project(tmp_path, RECIPE + table))
    assert codes(result) == [code], result.diagnostics
    return result.diagnostics[0].message, result.diagnostics[0].help


@pytest.mark.parametrize("kind", LAYERED)
def test_each_kind_plans_with_its_defaults(tmp_path: Path, kind: str) -> None:
    adapter = planned(tmp_path, f'[adapter]\nkind = "{kind}"\n')
    row = ADAPTERS[adapter.kind]
    assert (adapter.rank, adapter.alpha) == ((16, 16.0) if row.ranked else (0, 0.0))
    assert adapter.block_size == {"oft": 32, "boft": 8, "dylora": 4}.get(kind, 0)
    assert adapter.butterfly_factors == (1 if kind == "boft" else 0)
    assert adapter.init == ("gaussian" if kind in ("lora", "dora", "dylora") else "")
    assert described(adapter).startswith(row.title)


def test_all_of_a_kind_s_keys_reach_the_plan(tmp_path: Path) -> None:
    adapter = planned(
        tmp_path,
        '[adapter]\nkind = "lokr"\nrank = 8\nalpha = 4.0\nrank_dropout = 0.1\n'
        "module_dropout = 0.2\nfactor = 4\ndecompose_both = true\n"
        'targets = [".*attn1.*"]\nexclude = [".*to_k"]\n'
        'ranks = { ".*to_q" = 32 }\nalphas = { ".*to_v" = 2.0 }\n',
    )
    assert (adapter.rank_dropout, adapter.module_dropout) == (0.1, 0.2)
    assert (adapter.factor, adapter.decompose_both) == (4, True)
    assert adapter.exclude == (".*to_k",)
    assert adapter.ranks == (Ranked(pattern=".*to_q", rank=32),)
    assert adapter.alphas == (Scaled(pattern=".*to_v", alpha=2.0),)


@pytest.mark.parametrize(
    ("more", "size"),
    [
        ("rank = 6", 2),
        ("rank = 5", 1),
        ('ranks = { ".*to_q" = 6 }', 2),
        ("rank = 6\nblock_size = 3", 3),
    ],
)
def test_dylora_s_blocks_divide_its_ranks(tmp_path: Path, more: str, size: int) -> None:
    assert planned(tmp_path, f'[adapter]\nkind = "dylora"\n{more}\n').block_size == size


@pytest.mark.parametrize(
    ("more", "code", "words", "help"),
    [
        (
            'kind = "dylora"\nrank = 6\nranks = { ".*to_q" = 4 }\nblock_size = 6',
            "conflict",
            "rank of 4 can't be cut into blocks of 6",
            "say 2,",
        ),
        (
            'kind = "dylora"\nrank = 16\nblock_size = 32',
            "conflict",
            "rank of 16 can't be cut into blocks of 32",
            "say 8,",  # 16 would train the whole rank
        ),
        (
            'kind = "dylora"\nrank = 16\nranks = { ".*to_q" = 32 }\nblock_size = 32',
            "conflict",
            "rank of 16 can't be cut into blocks of 32",
            "say 16,",
        ),
        ('kind = "dylora"\nrank = 4\nblock_size = 4', "no-effect", "the whole rank", '"lora"'),
        ('kind = "dylora"\ninit = "pissa"', "conflict", "can't start as", "`gaussian`"),
        ('kind = "oft"\nblock_size = 1', "out-of-range", "can't be rotated", "2 at least"),
        ('kind = "boft"\nblock_size = 1', "out-of-range", "can't be rotated", "2 at least"),
    ],
)
def test_blocks_that_can_t_be_had(
    tmp_path: Path, more: str, code: str, words: str, help: str
) -> None:
    message, told = refused(tmp_path, f"[adapter]\n{more}\n", code)
    assert words in message and help in told


def test_alpha_follows_the_rank_where_it_is_open(tmp_path: Path) -> None:
    table = (
        '[adapter]\nkind = "lora"\nrank = 8\nranks = { "a\\\\.b" = 32, "a.*" = 4 }\n'
        'alphas = { "a\\\\.c" = 1.0 }\n'
    )
    adapter = planned(tmp_path, table)
    assert [rank_of(adapter, name) for name in ("a.b", "a.c", "d")] == [32, 4, 8]
    assert [alpha_of(adapter, name) for name in ("a.b", "a.c", "d")] == [32.0, 1.0, 8.0]
    fixed = planned(tmp_path, table.replace("rank = 8", "rank = 8\nalpha = 16.0"))
    assert [alpha_of(fixed, name) for name in ("a.b", "a.c", "d")] == [16.0, 1.0, 16.0]


def test_the_scale_divides_by_the_rank_or_by_its_root(tmp_path: Path) -> None:
    table = '[adapter]\nkind = "dora"\nrank = 64\nalpha = 16.0\n'
    assert scale_of(planned(tmp_path, table), "a") == 0.25
    assert scale_of(planned(tmp_path, table + 'scaling = "sqrt-rank"\n'), "a") == 2.0


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("oft", "rank = 8"),
        ("boft", "alpha = 8.0"),
        ("lora", "block_size = 8"),
        ("lora", "factor = 8"),
        ("lora", "module_dropout = 0.1"),
        ("loha", "dropout = 0.1"),
        ("loha", 'scaling = "rank"'),
        ("loha", "decompose_both = false"),
        ("lokr", 'init = "gaussian"'),
        ("boft", "block_share = true"),
        ("oft", "butterfly_factors = 2"),
        ("oft", 'ranks = { ".*" = 4 }'),
    ],
)
def test_a_key_that_the_kind_does_not_have(tmp_path: Path, kind: str, line: str) -> None:
    message, help = refused(tmp_path, f'[adapter]\nkind = "{kind}"\n{line}\n', "no-effect")
    assert message == f"an adapter of kind `{kind}` takes no `{line.split(' ')[0]}`"
    assert f"`{ADAPTERS[kind].keys[0]}`" in help  # type: ignore[index]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ('kind = "dora"\ninit = "pissa"', "kind `dora` can't start as `pissa`"),
        ('kind = "lora"\ninit = "orthogonal"\nrank = 7', "which 7 does not allow"),
        ('kind = "lora"\ninit = "orthogonal"\nranks = { ".*" = 9 }', "which 9 does not"),
        ('kind = "boft"\nblock_size = 5\nbutterfly_factors = 2', "blocks of 5 can't be halved"),
        (
            'kind = "lora"\ninit = "olora"\n[model.transformer]\nquantize = "int8"',
            "`olora` takes over weights",
        ),
    ],
)
def test_what_excludes_each_other(tmp_path: Path, table: str, words: str) -> None:
    message, _ = refused(tmp_path, f"[adapter]\n{table}\n", "conflict")
    assert words in message


def test_the_base_s_own_predictions_need_the_whole_base(tmp_path: Path) -> None:
    recipe = RECIPE + '[adapter]\nkind = "lora"\ninit = "pissa"\n'
    more = (
        '[[data.source]]\nid = "kept"\npath = "pictures"\n'
        'captions = { from = "instance", prompt = "a dog" }\n'
        'regularisation = { target = "base" }\n'
    )
    result = compiled(project(tmp_path, recipe + more))
    (fault,) = [one for one in result.diagnostics if one.severity == "error"]
    assert (fault.code, fault.path) == ("conflict", "adapter.init")
    assert "has no base to ask" in fault.message


@pytest.mark.parametrize("key", ["exclude", "ranks", "alphas"])
def test_patterns_are_compiled(tmp_path: Path, key: str) -> None:
    value = '["a(("]' if key == "exclude" else '{ "a((" = 4.0 }'
    value = value.replace("4.0", "4") if key == "ranks" else value
    message, _ = refused(tmp_path, f'[adapter]\nkind = "lora"\n{key} = {value}\n', "bad-pattern")
    assert message.startswith("`a((` is not a valid pattern: ")


def test_a_pattern_that_python_will_read_otherwise_one_day(tmp_path: Path) -> None:
    """It warns of `[[`, on the screen of whoever compiles it."""
    message, _ = refused(tmp_path, '[adapter]\nkind = "lora"\nexclude = ["a[[b]"]\n', "bad-pattern")
    assert message == "`a[[b]` is not a valid pattern: Possible nested set at position 2"


def stored(path: Path, tensors: dict[str, list[int]], **metadata: str) -> None:
    """A safetensors file of zeros."""
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 4 * shape[0] * shape[1]
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


TO_Q = "transformer_blocks.0.attn1.to_q"
TO_K = "transformer_blocks.0.attn1.to_k"
LORA = {f"transformer.{TO_Q}.lora_A.weight": [16, 4], f"transformer.{TO_Q}.lora_B.weight": [4, 16]}


def test_a_file_to_start_from_is_looked_into(tmp_path: Path) -> None:
    path = project(tmp_path, RECIPE + '[adapter]\nkind = "lora"\nfrom = "a.safetensors"\n')
    stored(path.parent / "a.safetensors", LORA)
    result = compiled(path)
    assert result.plan is not None and result.plan.adapter is not None, result.diagnostics
    assert result.plan.adapter.start == str(path.parent / "a.safetensors")
    stored(path.parent / "a.safetensors", {**LORA, f"transformer.{TO_Q}.more": [1, 1]})
    again = compiled(path).plan
    assert again is not None and again.digest != result.plan.digest


@pytest.mark.parametrize(
    ("kind", "more", "tensors", "words"),
    [
        ("lora", "rank = 8", LORA, "of rank 16, the recipe's is 8"),
        ("lora", 'ranks = { ".*to_q" = 4 }', LORA, "of rank 16, the recipe's is 4"),
        ("dora", "", LORA, "a LoRA without magnitudes"),
        ("lora", "", {**LORA, "x.lora_magnitude_vector": [4, 1]}, "it is a DoRA"),
        ("loha", "", LORA, "it holds no LoHa"),
        ("loha", "", {"lycoris_a.hada_w1_b": [4, 9]}, "of rank 4, the recipe's is 16"),
        ("oft", "", {"base_model.model.a.oft_R.weight": [2, 28]}, "of block size 8, the recipe's"),
    ],
)
def test_a_file_of_another_adapter(
    tmp_path: Path, kind: str, more: str, tensors: dict[str, list[int]], words: str
) -> None:
    table = f'[adapter]\nkind = "{kind}"\nfrom = "a.safetensors"\n{more}\n'
    path = project(tmp_path, RECIPE + table)
    stored(path.parent / "a.safetensors", tensors)
    result = compiled(path)
    assert codes(result) == ["bad-adapter"], result.diagnostics
    assert words in result.diagnostics[0].message


KOHYA = {
    "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": [48, 4],
    "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight": [12, 48],
    "lora_unet_joint_blocks_0_x_block_attn_proj.lora_down.weight": [16, 4],
    "lora_unet_joint_blocks_0_x_block_attn_proj.lora_up.weight": [4, 16],
}


@pytest.mark.parametrize("root", ["lora_te1", "lora_te2"])
def test_a_file_of_sd_scripts_is_looked_into(tmp_path: Path, root: str) -> None:
    """Layers that several modules share have a multiple of the rank; text encoders are known."""
    table = '[adapter]\nkind = "lora"\nfrom = "a.safetensors"\n'
    path = project(tmp_path, RECIPE.replace("sana", "sd3") + table, "sd3")
    file = path.parent / "a.safetensors"
    stored(file, KOHYA)
    found = [one for one in compiled(path).diagnostics if one.code == "bad-adapter"]
    assert not found
    stored(file, {k: [24 if n == 48 else n for n in shape] for k, shape in KOHYA.items()})
    (fault,) = [one for one in compiled(path).diagnostics if one.code == "bad-adapter"]
    assert "is of rank 24, the recipe's is 16" in fault.message
    theirs = f"{root}_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"
    stored(file, {**KOHYA, theirs: [16, 4]})
    (fault,) = [one for one in compiled(path).diagnostics if one.code == "bad-adapter"]
    words = "text encoder 2" if root == "lora_te2" else "text encoder"
    assert f"adapter of the {words}, which is not trained" in fault.message
    stored(file, {**KOHYA, "lora_unet_x.dora_scale": [4, 1]})
    (fault,) = [one for one in compiled(path).diagnostics if one.code == "bad-adapter"]
    assert "it is a DoRA" in fault.message


@pytest.mark.parametrize("content", [None, b"", b"not a header", b"\xff" * 64])
def test_a_file_that_is_none(tmp_path: Path, content: bytes | None) -> None:
    path = project(tmp_path, RECIPE + '[adapter]\nkind = "lora"\nfrom = "a.safetensors"\n')
    if content is not None:
        (path.parent / "a.safetensors").write_bytes(content)
    assert codes(compiled(path)) == ["missing-path" if content is None else "bad-adapter"]


def test_a_start_besides_the_file_s_is_refused(tmp_path: Path) -> None:
    table = '[adapter]\nkind = "lora"\nfrom = "a.safetensors"\ninit = "kaiming"\n'
    path = project(tmp_path, RECIPE + table)
    stored(path.parent / "a.safetensors", LORA)
    assert codes(compiled(path)) == ["no-effect"]


@pytest.mark.parametrize(
    ("kind", "meant"), [("t-lora", "lora"), ("locon", "lora"), ("diff", "full")]
)
def test_kinds_of_other_trainers_are_known_by_name(tmp_path: Path, kind: str, meant: str) -> None:
    _, help = refused(tmp_path, f'[adapter]\nkind = "{kind}"\n', "unknown-value")
    assert f"`{meant}`" in help


@pytest.mark.parametrize(
    ("more", "tensors", "help"),
    [
        ("rank = 8", LORA, "rank = 16"),
        (
            'rank = 8\ninit = "pissa"',
            LORA,
            "rank = 16, and leave `init` out: what starts as pissa leaves twice its rank",
        ),
        ('rank = 8\ninit = "kaiming"', LORA, "rank = 16, and leave `init` out"),
        ('ranks = { ".*to_q" = 4 }', LORA, "rank = 16, without `ranks`"),
        (
            'rank = 2\nranks = { ".*to_q" = 8 }\ninit = "olora"',
            {**LORA, f"transformer.{TO_K}.lora_A.weight": [4, 4]},
            "twice the `rank` and twice each of `ranks`, and leave `init` out: "
            "what starts as olora leaves twice its rank",
        ),
        ("rank = 8", {**LORA, f"transformer.{TO_K}.lora_A.weight": [4, 4]}, ""),
        ("", {**LORA, "x.lora_magnitude_vector": [4, 1]}, ""),
    ],
)
def test_a_file_of_another_rank_is_one_mistake_with_the_right_one(
    tmp_path: Path, more: str, tensors: dict[str, list[int]], help: str
) -> None:
    """Also what a start that takes from the base leaves, whose file is of twice the rank."""
    table = f'[adapter]\nkind = "lora"\nfrom = "a.safetensors"\n{more}\n'
    path = project(tmp_path, RECIPE + table)
    stored(path.parent / "a.safetensors", tensors)
    result = compiled(path)
    assert [fault.help for fault in result.diagnostics] == [help]
    assert codes(result) == ["bad-adapter"]
    if help.startswith("rank = 16"):
        text = RECIPE + '[adapter]\nkind = "lora"\nfrom = "a.safetensors"\nrank = 16\n'
        path.write_text(text)
        assert compiled(path).plan is not None


def test_a_rank_that_depends_on_the_noise(tmp_path: Path) -> None:
    """T-LoRA is told as one; what can't be masked is refused."""
    table = '[adapter]\nkind = "lora"\nrank = 8\n'
    made = compiled(project(tmp_path, RECIPE + table + "min_rank = 2\n"))
    assert codes(made) == ["rank-by-noise"]
    assert made.plan is not None and made.plan.adapter is not None
    assert made.plan.adapter.min_rank == 2
    assert described(made.plan.adapter) == "LoRA of rank 8, of 2 at full noise"


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        ('kind = "lora"\nrank = 8\nmin_rank = 8', "conflict", "leaves nothing to grow"),
        ('kind = "lora"\nranks = { ".*to_q" = 2 }\nmin_rank = 3', "conflict", "in a rank of 2"),
        ('kind = "lora"\nmin_rank = 2\ninit = "orthogonal"', "conflict", "`orthogonal`"),
        ('kind = "lora"\nmin_rank = 2\ninit = "pissa"', "conflict", "`pissa`"),
        ('kind = "dylora"\nmin_rank = 2', "no-effect", "takes no `min_rank`"),
    ],
)
def test_a_rank_that_can_t_depend_on_the_noise(
    tmp_path: Path, more: str, code: str, words: str
) -> None:
    message, _ = refused(tmp_path, f"[adapter]\n{more}\n", code)
    assert words in message

# What there is to do; `just --list` says it too.

python := env("PYTHON", "python3")

# Format, lint, types and the quick tests.
check:
    {{python}} -m ruff format --check .
    {{python}} -m ruff check .
    {{python}} -m mypy
    {{python}} -m pytest -q -m "not slow and not gpu"

# Put the code into the one format, and fix what can be fixed.
format:
    {{python}} -m ruff format .
    {{python}} -m ruff check --fix .

# All tests.
test *arguments:
    {{python}} -m pytest {{arguments}}

# Every family x method x adapter x number format x checkpointing, and their memory: an hour or so.
test-matrix *arguments:
    TUNER_WHOLE_MATRIX=1 {{python}} -m pytest -q --dist load tests/test_matrix.py tests/test_matrix_more.py tests/runtime/test_memory_families.py tests/runtime/test_memory_text.py tests/runtime/test_adapter_runs.py {{arguments}}

# Start-up times, the scan of 100,000 pictures, a plan of a million, feeding: some minutes.
bench:
    {{python}} benchmarks/startup.py
    {{python}} benchmarks/first_plan.py
    {{python}} benchmarks/candidates.py
    {{python}} benchmarks/scan.py
    {{python}} benchmarks/million.py
    {{python}} benchmarks/feed.py

# How much of the time of filling a cache is the encoder's own, over the photographs in FOLDER.
bench-fill folder:
    {{python}} benchmarks/fill.py {{folder}}

# Planned memory beside the allocator's, over 30 configurations: needs a CUDA device.
bench-gpu-memory *arguments:
    {{python}} benchmarks/gpu_memory.py {{arguments}}

# What offloading costs a step on this machine's CUDA device; writes docs/measurements/
bench-gpu-offload *arguments:
    {{python}} benchmarks/gpu_offload.py {{arguments}}

# Write what is generated from the schema classes: the editors' schema and the reference page.
generate:
    {{python}} -m tuner schema --out recipes/recipe.schema.json
    {{python}} -m tuner reference --out docs/reference.md
    {{python}} -m tuner reference --families --out docs/families.md

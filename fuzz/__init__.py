"""Coverage-guided fuzzing of what reads model files: `python -m fuzz TARGET --seconds 60`.

Each target is a module with `MAX_BYTES`, `seeds()` and `examine(data)`, which says what became of an input and fails
for a defect. An input that fails is kept in regressions/TARGET, and
tests/test_fuzz.py examines those, and the seeds, on every run, without the fuzzer.
"""

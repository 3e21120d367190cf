"""How fast is the project beside what others would use? See benchmarks/README.md; `python -m benchmarks.speed` measures."""

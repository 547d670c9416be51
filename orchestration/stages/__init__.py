"""The stages of the recipe. Each is a module with `run(context) -> result`; `orchestration/recipe.py` puts them in order."""

"""What a run is: Hydra groups (YAML) and the typed, frozen form they are composed to (`schema.py`)."""

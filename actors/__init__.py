"""Everything that runs inside one rank: models, maths, the DeepSpeed engine, and one plain class per role. No Ray in here."""

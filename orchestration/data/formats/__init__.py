"""One module per format of rows. Each turns one row into a `Sample`, or says in a ValueError why it cannot be used."""

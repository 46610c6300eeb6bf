"""In place of mlflow: the calls that Kiln makes, with the library's own arguments, written down."""

"""`python -m monitoring`: writes what is made of series and alerts; `make metrics` runs it."""

from monitoring import files

if __name__ == "__main__":
    for file, content in files.made().items():
        file.write_text(content)

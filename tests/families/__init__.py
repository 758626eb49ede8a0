"""Every family of models that is tried from capture to reload, as rows of the table in docs/families.md.

A family is an object with a `name`, a `slow` flag and `walk(folder) -> Row`; `Pretrained` is one of transformers. A new
family is one entry in the list of its file (`vision`, `audio`, `language`, `plain`). Afterwards write the page anew:

    PYTHONPATH=.:tests python -m families
"""

"""How the embedded model was made; not part of the installed package.

    python -m tools.train_tiny.train        from the root of the repository

stories.py    the language it speaks, a grammar
tokenizer.py  its tokenizer, trained on stories
train.py      makes a checkpoint
report.py     completes the standard prompts with one, and says how sure it is
"""

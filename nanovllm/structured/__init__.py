"""Structured output: completions that follow a JSON schema, a regular expression or a grammar.

schemas.py and patterns.py know which of JSON schema's keywords and of a regex the library xgrammar
enforces, and refuse the rest; grammars.py compiles them, and says which tokens may come next.
"""

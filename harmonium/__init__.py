"""Harmonium runs OpenAI's open-weight gpt-oss models on the machine you have."""

__version__ = "0.1.0"

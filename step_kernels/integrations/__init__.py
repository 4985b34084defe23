"""Adapters for engines; each module imports its engine, so import the one you use."""

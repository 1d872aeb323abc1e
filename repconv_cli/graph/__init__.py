"""Trace, constant evaluation, rules, plan, rewrite, certificate, and the graph as JSON and back."""

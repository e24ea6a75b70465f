"""Reads what a TTT model learns from text: buckets, statistics, corpora, run folders, checks and figures.

Works by the attributes of a model's outputs and configuration, so it serves classes loaded from the Hub as well.
"""

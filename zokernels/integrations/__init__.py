"""Bridges to other people's training loops; each module imports its library, and nothing here is imported
unasked.
"""

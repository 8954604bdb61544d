"""Judging a model, guarded or not: one file a kind of test.

sources (questions and texts) -> tasks -> harness (subjects answer items; the ledger keeps what is finished) -> records
-> summary (figures) -> result, which joining puts together with others of the same items

sweep, sequence and comparison judge many subjects: choosing (on dev items, one of many settings); for methods that are
compared also fitted (each once), speed, survival (after training further)
"""

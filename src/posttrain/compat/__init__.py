"""Names of other libraries, so that scripts written for them run after their import was changed. Thin: everything is
done elsewhere.

`posttrain.compat.trl` for TRL, `posttrain.compat.unsloth` for Unsloth. Importing them imports nothing heavy.
"""

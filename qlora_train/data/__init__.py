"""Rows -> messages -> tokens with a supervised mask -> packed bins, read in a resumable order.

The story in files. Reading: `sources` finds files and hub ids and opens them as `tables` of rows
(`json_tables`, `csv_table`, `arrow_tables`, over `text_files`); `formats` says what a row's columns mean,
`conversations` how messages are written; `content` is what comes out. Tokens: `tokenization` makes texts of
contents: `chat` tells what an assistant must say behind which prompt, `chat_tokens` makes texts of that,
`encoding` keeps prompt and answer apart, `control_text` keeps quoted special tokens text; `long_chats` and
`fitting` make documents that are short enough. All of it, batch by batch: `row_reader` in the processes of
`workers`, for `open_sources`, into `tokenized_rows`, which `token_cache` keeps. Then `building` splits
(`split`) and packs (`packing`) them, `dataset` hands out micro-batches, `report` says what happened,
`preview` shows it. Numpy only, no torch.
"""

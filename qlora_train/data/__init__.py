"""Examples -> messages -> tokens with a supervised mask -> packed bins, read in a resumable order.

An example is a line of the data set. The modules, in the order in which it meets them:

    reading     `sources` finds files and hub ids and opens them as `tables` of examples (`json_tables`,
                `csv_table`, `arrow_tables`, over `text_files`)
    meaning     `formats` says what an example's columns mean, `conversations` how messages are written;
                `content` is what comes out
    tokens      `tokenization` makes `documents` of contents: `chat` tells what an assistant must say behind
                which prompt, `chat_tokens` makes texts of that, `encoding` keeps prompt and answer apart,
                `control_text` keeps quoted special tokens text, `tokenizing` calls the tokenizer;
                `long_chats` and `fitting` make documents that are short enough
    batches     `open_sources` has each batch read by `example_reader`, in the processes of `workers`, into
                `tokenized_examples`, which `token_cache` keeps
    bins        `building` splits (`split`) and packs (`packing`) them, `dataset` hands out micro-batches
    in words    `notes` and `report` say what happened, `statistics` and `preview` show it

Numpy only, no torch.
"""

"""A run's record as pictures: a live page (`server`, `page`, `group_page`) and one file to send (`report`), from the
same panels and charts."""

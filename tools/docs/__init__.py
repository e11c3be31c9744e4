"""The pages made from what they describe: tables from records. Not in the wheel."""

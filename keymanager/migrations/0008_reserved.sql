-- A number that another change takes.
SELECT 1;

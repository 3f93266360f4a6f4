-- What each topic holds
SELECT * FROM topics ORDER BY topic

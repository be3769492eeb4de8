SELECT 0 AS kind, m.trimmed AS low, m.settled AS high, m.incarnation, m.version,
    JSON_ARRAY(
        COALESCE((SELECT MAX(c.id) FROM sa_tablecache_changelog AS c), 0),
        @@global.auto_increment_increment, {server}
    ) AS server
FROM sa_tablecache_meta AS m WHERE m.one = 1
UNION ALL
SELECT 1, g.previous + 1, g.id - 1, '', '', NULL
FROM (
    SELECT c.id, COALESCE(LAG(c.id) OVER (ORDER BY c.id), m.settled) AS previous
    FROM sa_tablecache_meta AS m
    JOIN sa_tablecache_changelog AS c ON c.id > m.settled
    WHERE m.one = 1
) AS g
WHERE g.id > g.previous + 1

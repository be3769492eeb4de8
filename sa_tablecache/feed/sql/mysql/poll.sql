SELECT 0 AS kind, m.trimmed AS id, m.last AS writer, DATABASE() AS table_schema,
    m.incarnation AS table_name, m.version AS operation,
    JSON_ARRAY(
        COALESCE((SELECT MAX(c.id) FROM sa_tablecache_changelog AS c), 0),
        @@global.auto_increment_increment, {server}
    ) AS changed, NULL AS bounds
FROM sa_tablecache_meta AS m WHERE m.one = 1
UNION ALL
SELECT 1, 0, 0, w.table_schema, w.table_name, '', w.definition, NULL
FROM sa_tablecache_watched AS w
UNION ALL
(
    SELECT 2, c.id, c.writer, c.table_schema, c.table_name, c.operation, c.changed, c.bounds
    FROM sa_tablecache_changelog AS c
    WHERE {behind}
    ORDER BY c.id LIMIT 18446744073709551615
)

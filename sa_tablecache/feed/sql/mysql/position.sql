SELECT m.trimmed, m.position, m.incarnation, m.version,
    JSON_ARRAY(
        COALESCE((SELECT MAX(c.id) FROM sa_tablecache_changelog AS c), 0),
        @@global.auto_increment_increment, {server}
    ) AS server
FROM sa_tablecache_meta AS m WHERE m.one = 1

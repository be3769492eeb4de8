-- A trigger stands in the database of its table, and names no other one: a view leads to the
-- changelog. Where one leads to the changelog of another database already, this fails.
SET @sa_tablecache_sql = IF(
    EXISTS (
        SELECT 1 FROM information_schema.views
        WHERE table_schema = {schema} AND table_name = 'sa_tablecache_changelog'
            AND LOCATE(
                CONCAT('`', REPLACE(DATABASE(), '`', '``'), '`.`sa_tablecache_changelog`'),
                view_definition
            ) > 0
    ),
    'DO 0',
    CONCAT(
        'CREATE SQL SECURITY DEFINER VIEW ', {quoted_schema}, '.sa_tablecache_changelog AS ',
        'SELECT id, at, writer, table_schema, table_name, operation, changed, bounds FROM `',
        REPLACE(DATABASE(), '`', '``'), '`.sa_tablecache_changelog'
    )
)

PREPARE sa_tablecache_view FROM @sa_tablecache_sql

EXECUTE sa_tablecache_view

DEALLOCATE PREPARE sa_tablecache_view

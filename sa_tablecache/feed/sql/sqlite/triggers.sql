CREATE TRIGGER {schema}.{insert} AFTER INSERT ON {table} BEGIN
    INSERT INTO sa_tablecache_changelog (relation, operation, keys, bounds)
    VALUES ({name}, 'I', {new_key}, {new_bounds});
END

CREATE TRIGGER {schema}.{update} AFTER UPDATE ON {table} BEGIN
    INSERT INTO sa_tablecache_changelog (relation, operation, keys, bounds)
    VALUES ({name}, 'U', {old_key}, {both_bounds});
    INSERT INTO sa_tablecache_changelog (relation, operation, keys, bounds)
    SELECT {name}, 'U', {new_key}, {both_bounds} WHERE {key_changed};
END

CREATE TRIGGER {schema}.{delete} AFTER DELETE ON {table} BEGIN
    INSERT INTO sa_tablecache_changelog (relation, operation, keys, bounds)
    VALUES ({name}, 'D', {old_key}, {old_bounds});
END

-- A small shop: who buys, what there is, and what was bought.
CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, city TEXT);
CREATE TABLE products (id INTEGER PRIMARY KEY, name TEXT, kind TEXT, price REAL);
CREATE TABLE orders (id INTEGER PRIMARY KEY, customer INTEGER REFERENCES customers, product INTEGER REFERENCES products, pieces INTEGER);
INSERT INTO customers VALUES
  (1, 'Ada', 'Oslo'), (2, 'Bo', 'Bern'), (3, 'Cleo', 'Oslo'), (4, 'Dora', 'Rome'), (5, 'Emil', 'Bern'), (6, 'Finn', 'Oslo');
INSERT INTO products VALUES
  (1, 'pen', 'paper', 2.5), (2, 'book', 'paper', 12.0), (3, 'cup', 'kitchen', 6.0), (4, 'pan', 'kitchen', 24.0), (5, 'lamp', 'home', 30.0);
INSERT INTO orders VALUES
  (1, 1, 1, 10), (2, 1, 3, 2), (3, 2, 2, 1), (4, 3, 4, 1), (5, 4, 1, 4), (6, 5, 5, 2), (7, 6, 3, 6), (8, 3, 2, 3);

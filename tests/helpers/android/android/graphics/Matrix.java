package android.graphics;

/** x' = a x + b y, y' = c x + d y, y downward; quarter turns clockwise and mirrors alone. */
public final class Matrix {
    int a = 1, b = 0, c = 0, d = 1;

    public void setScale(float x, float y) { set((int) x, 0, 0, (int) y); }

    public void setRotate(float degrees) {
        int quarters = Math.floorMod((int) degrees / 90, 4);
        int cos = new int[] {1, 0, -1, 0}[quarters], sin = new int[] {0, 1, 0, -1}[quarters];
        set(cos, -sin, sin, cos);
    }

    public boolean postScale(float x, float y) {
        set((int) x * a, (int) x * b, (int) y * c, (int) y * d);
        return true;
    }

    private void set(int a, int b, int c, int d) {
        this.a = a;
        this.b = b;
        this.c = c;
        this.d = d;
    }
}

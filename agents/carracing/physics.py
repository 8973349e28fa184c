"""CarRacing's physics, step for step, compiled.

Gymnasium's `CarRacing-v3` spends about 120 µs a step in Python and Box2D besides its drawing. This file computes the same
step in about a tenth of that: the wheel model of Gymnasium's `car_dynamics` in double precision, and what Box2D 2.3 does with
one hull, four wheels and four revolute joints in single precision, operation for operation, so that positions, contacts and
rewards are those of the reference (tests/agents/test_carracing.py holds them equal, bit for bit where floats are compared).

What Box2D does here (Catto, "Iterative Dynamics with Temporal Coherence", GDC 2005; manual of version 2.3):
  1. sensors: which tile does which wheel touch, at the positions of the last step;
  2. velocities take the forces; 180 sweeps of sequential impulses over the four joints, warm-started;
  3. positions take the velocities; at most 60 sweeps of position correction; 4. bodies at rest for half a second are put to sleep.
A sweep that changes no velocity bit would be followed by equal ones, so the loop leaves there: that changes nothing but the time.

Shapes: N cars (one a row); bodies are ordered hull, front left, front right, rear left, rear right.
Units: Box2D's metres, radians, seconds; one step is 1/50 s.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

f4 = np.float32
STEP = f4(1.0 / 50.0)
SIZE = 0.02
ENGINE_POWER = 100000000 * SIZE * SIZE
WHEEL_INERTIA = 4000 * SIZE * SIZE
FRICTION_LIMIT = 1000000 * SIZE * SIZE
WHEEL_RADIUS = 27 * SIZE
TYRE = 205000 * SIZE * SIZE
PLAYFIELD = 2000 / 6.0
MAX_TORQUE = f4(180 * 900 * SIZE * SIZE)
LIMIT = f4(0.4)
LINEAR_SLOP, ANGULAR_SLOP = f4(0.005), f4(2.0) / f4(180.0) * f4(3.14159265359)
MAX_ANGULAR_CORRECTION = f4(8.0) / f4(180.0) * f4(3.14159265359)
MAX_TRANSLATION, MAX_ROTATION = f4(2.0), f4(0.5) * f4(3.14159265359)
LINEAR_SLEEP, ANGULAR_SLEEP, TIME_TO_SLEEP = f4(0.01), f4(2.0) / f4(180.0) * f4(3.14159265359), f4(0.5)
TOUCH = 0.02 + 10 * 1.1920929e-07  # two polygon skins of 0.01, and the tolerance of Box2D's overlap test
ZERO, ONE, HALF = f4(0.0), f4(1.0), f4(0.5)
WHEEL_ANCHORS = np.array([[-55, 80], [55, 80], [-55, -82], [55, -82]], np.float64) * SIZE
WHEEL_POLYGON = np.array([[-14, 27], [14, 27], [14, -27], [-14, -27]], np.float64) * SIZE
HULL_POLYGONS = (
    np.array([[-60, 130], [60, 130], [60, 110], [-60, 110]]) * SIZE,
    np.array([[-15, 120], [15, 120], [20, 20], [-20, 20]]) * SIZE,
    np.array([[25, 20], [50, -10], [50, -40], [20, -90], [-20, -90], [-50, -40], [-50, -10], [-25, 20]]) * SIZE,
    np.array([[-50, -120], [50, -120], [50, -90], [-50, -90]]) * SIZE,
)

#: one car's state, as numpy's structured type: everything that the next step depends on
CAR = np.dtype(
    [
        ("centre", f4, (5, 2)),  # centres of mass
        ("angle", f4, 5),
        ("velocity", f4, (5, 2)),
        ("spin", f4, 5),
        ("sleep", f4, 5),
        ("impulse", f4, (4, 3)),  # of each joint, kept for warm starting
        ("motor_impulse", f4, 4),
        ("limit_state", np.int8, 4),  # 0 free, 1 at the lower, 2 at the upper limit
        ("position", f4, (5, 2)),  # origins of the bodies
        ("sine", f4, 5),
        ("cosine", f4, 5),
        ("omega", np.float64, 4),  # wheels
        ("phase", np.float64, 4),
        ("gas", np.float64, 4),
        ("brake", np.float64),
        ("steer", np.float64),
        ("on_road", np.int8, 4),
        ("reward", np.float64),
        ("previous_reward", np.float64),
        ("time", np.float64),
        ("visited", np.int32),
        ("new_lap", np.int8),
        ("steps", np.int32),
        ("last_tile_step", np.int32),
    ],
    align=True,
)


def measure_bodies() -> np.ndarray:
    """Ask Box2D for the mass properties that it gives the car's bodies.

    Returns:
        float32 [6]: inverse mass and inverse inertia of the hull, local centre of the hull (x, y), inverse mass and inverse inertia of a wheel.
    """
    import Box2D

    world = Box2D.b2World((0, 0))

    def body(polygons: tuple[np.ndarray, ...], density: float):
        fixtures = [
            Box2D.b2FixtureDef(shape=Box2D.b2PolygonShape(vertices=[tuple(map(float, v)) for v in p]), density=density)
            for p in polygons
        ]
        return world.CreateDynamicBody(position=(0, 0), angle=0.0, fixtures=fixtures)

    values = []
    for polygons, density in ((HULL_POLYGONS, 1.0), ((WHEEL_POLYGON,), 0.1)):
        made = body(polygons, density)
        made.ApplyAngularImpulse(1.0, True)
        inverse_inertia = made.angularVelocity
        made.angularVelocity = 0.0
        made.linearVelocity = (0, 0)
        made.ApplyLinearImpulse((1.0, 0.0), made.worldCenter, True)
        values += [made.linearVelocity[0], inverse_inertia]
        if density == 1.0:
            values += [made.localCenter[0], made.localCenter[1]]
    return np.array(values, f4)


@njit(cache=True, nogil=True, inline="always")
def _cross(ax, ay, bx, by):
    return ax * by - ay * bx


@njit(cache=True, nogil=True)
def place(car, bodies, angle, x, y):
    """Put a car on the track: `angle` [rad], `x`, `y` [m] as Gymnasium's `Car` takes them; everything else starts at zero."""
    a = f4(angle)
    for i in range(5):
        car.angle[i] = a
        car.sine[i] = math.sin(a)
        car.cosine[i] = math.cos(a)
        wx, wy = x, y
        if i > 0:
            wx, wy = x + WHEEL_ANCHORS[i - 1, 0], y + WHEEL_ANCHORS[i - 1, 1]
        car.position[i, 0], car.position[i, 1] = f4(wx), f4(wy)
        car.centre[i, 0], car.centre[i, 1] = f4(wx), f4(wy)
    lx, ly = bodies[2], bodies[3]
    s, c = car.sine[0], car.cosine[0]
    car.centre[0, 0] = (c * lx - s * ly) + car.position[0, 0]
    car.centre[0, 1] = (s * lx + c * ly) + car.position[0, 1]


@njit(cache=True, nogil=True)
def control(car, steer, gas, brake):
    """Take an action: steer in [-1, 1] (right is positive), gas and brake in [0, 1]; the gas pedal follows at 0.1 a step."""
    car.steer = -steer
    gas = min(max(gas, 0.0), 1.0)
    for i in range(2, 4):
        car.gas[i] += min(gas - car.gas[i], 0.1)
    car.brake = brake


@njit(cache=True, nogil=True)
def _wheels(car, motor_speed, force):
    """Gymnasium's tyre model (`Car.step`): motor speeds of the joints and the force on each wheel."""
    dt = 1.0 / 50.0
    for i in range(4):
        b = i + 1
        joint = np.float64(car.angle[b] - car.angle[0] - ZERO)
        steer = car.steer if i < 2 else 0.0
        motor_speed[i] = f4(np.sign(steer - joint) * min(50.0 * abs(steer - joint), 3.0))
        limit = FRICTION_LIMIT if car.on_road[i] else FRICTION_LIMIT * 0.6
        s, c = car.sine[b], car.cosine[b]
        fx, fy = np.float64(c * ZERO - s * ONE), np.float64(s * ZERO + c * ONE)
        sx, sy = np.float64(c * ONE - s * ZERO), np.float64(s * ONE + c * ZERO)
        vx, vy = np.float64(car.velocity[b, 0]), np.float64(car.velocity[b, 1])
        vf, vs = fx * vx + fy * vy, sx * vx + sy * vy
        omega = car.omega[i]
        omega += dt * ENGINE_POWER * car.gas[i] / WHEEL_INERTIA / (abs(omega) + 5.0)
        if car.brake >= 0.9:
            omega = 0.0
        elif car.brake > 0:
            val = 15 * car.brake
            if abs(val) > abs(omega):
                val = abs(omega)
            omega += -np.sign(omega) * val
        car.phase[i] += omega * dt
        f_force = (-vf + omega * WHEEL_RADIUS) * TYRE
        p_force = -vs * TYRE
        size = math.sqrt(f_force * f_force + p_force * p_force)
        if size > limit:
            f_force /= size
            p_force /= size
            f_force *= limit
            p_force *= limit
        omega -= dt * f_force * WHEEL_RADIUS / WHEEL_INERTIA
        car.omega[i] = omega
        force[i, 0] = f4(p_force * sx + f_force * fx)
        force[i, 1] = f4(p_force * sy + f_force * fy)


@njit(cache=True, nogil=True)
def _velocity_sweep(car, motor_speed, r, mass, m, inertia):
    """One sweep of sequential impulses over the joints, newest first as Box2D's island holds them; False if no bit changed."""
    changed = False
    max_impulse = STEP * MAX_TORQUE
    m_a, i_a, m_b, i_b = m[0], inertia[0], m[1], inertia[1]
    motor_mass = i_a + i_b
    motor_mass = ONE / motor_mass
    vax, vay, wa = car.velocity[0, 0], car.velocity[0, 1], car.spin[0]
    for j in range(3, -1, -1):
        b = j + 1
        vbx, vby, wb = car.velocity[b, 0], car.velocity[b, 1], car.spin[b]
        rax, ray, rbx, rby = r[j, 0], r[j, 1], r[j, 2], r[j, 3]
        k11, k12, k13, k22, k23, k33 = mass[j, 0], mass[j, 1], mass[j, 2], mass[j, 3], mass[j, 4], mass[j, 5]
        o0, o1, o2, o3, o4, o5 = vax, vay, wa, vbx, vby, wb
        impulse = -motor_mass * (wb - wa - motor_speed[j])
        old = car.motor_impulse[j]
        new = max(-max_impulse, min(old + impulse, max_impulse))
        car.motor_impulse[j] = new
        changed |= new != old
        impulse = new - old
        wa -= i_a * impulse
        wb += i_b * impulse
        cx = vbx + (-wb * rby) - vax - (-wa * ray)
        cy = vby + wb * rbx - vay - wa * rax
        det2 = k11 * k22 - k12 * k12
        if det2 != ZERO:
            det2 = ONE / det2
        if car.limit_state[j] != 0:
            cz = wb - wa
            # cofactors of the symmetric 3x3 effective mass
            e0, e1, e2 = k22 * k33 - k23 * k23, k23 * k13 - k12 * k33, k12 * k23 - k22 * k13
            det = k11 * e0 + k12 * e1 + k13 * e2
            if det != ZERO:
                det = ONE / det
            px = det * (cx * e0 + cy * e1 + cz * e2)
            g0, g1, g2 = cy * k33 - cz * k23, cz * k13 - cx * k33, cx * k23 - cy * k13
            py = det * (k11 * g0 + k12 * g1 + k13 * g2)
            h0, h1, h2 = k22 * cz - k23 * cy, k23 * cx - k12 * cz, k12 * cy - k22 * cx
            pz = det * (k11 * h0 + k12 * h1 + k13 * h2)
            px, py, pz = -px, -py, -pz
            total = car.impulse[j, 2] + pz
            lower = car.limit_state[j] == 1
            if (lower and total < ZERO) or (not lower and total > ZERO):
                bx = -cx + car.impulse[j, 2] * k13
                by = -cy + car.impulse[j, 2] * k23
                px = det2 * (k22 * bx - k12 * by)
                py = det2 * (k11 * by - k12 * bx)
                pz = -car.impulse[j, 2]
                car.impulse[j, 0] += px
                car.impulse[j, 1] += py
                car.impulse[j, 2] = ZERO
            else:
                car.impulse[j, 0] += px
                car.impulse[j, 1] += py
                car.impulse[j, 2] += pz
            changed |= pz != ZERO
            vax -= m_a * px
            vay -= m_a * py
            wa -= i_a * (_cross(rax, ray, px, py) + pz)
            vbx += m_b * px
            vby += m_b * py
            wb += i_b * (_cross(rbx, rby, px, py) + pz)
        else:
            bx, by = -cx, -cy
            px = det2 * (k22 * bx - k12 * by)
            py = det2 * (k11 * by - k12 * bx)
            car.impulse[j, 0] += px
            car.impulse[j, 1] += py
            vax -= m_a * px
            vay -= m_a * py
            wa -= i_a * _cross(rax, ray, px, py)
            vbx += m_b * px
            vby += m_b * py
            wb += i_b * _cross(rbx, rby, px, py)
        changed |= px != ZERO or py != ZERO
        changed |= o0 != vax or o1 != vay or o2 != wa or o3 != vbx or o4 != vby or o5 != wb
        car.velocity[b, 0], car.velocity[b, 1], car.spin[b] = vbx, vby, wb
    car.velocity[0, 0], car.velocity[0, 1], car.spin[0] = vax, vay, wa
    return changed


@njit(cache=True, nogil=True)
def _prepare_joints(car, r, mass, m, inertia, lx, ly):
    """Lever arms, effective masses, limit states and warm starting (Box2D's InitVelocityConstraints), joints newest first."""
    m_a, i_a, m_b, i_b = m[0], inertia[0], m[1], inertia[1]
    for j in range(3, -1, -1):
        b = j + 1
        s, c = f4(math.sin(car.angle[0])), f4(math.cos(car.angle[0]))
        ax, ay = f4(WHEEL_ANCHORS[j, 0]) - lx, f4(WHEEL_ANCHORS[j, 1]) - ly
        rax, ray = c * ax - s * ay, s * ax + c * ay
        rbx, rby = ZERO, ZERO
        r[j, 0], r[j, 1], r[j, 2], r[j, 3] = rax, ray, rbx, rby
        mass[j, 0] = m_a + m_b + ray * ray * i_a + rby * rby * i_b
        mass[j, 1] = -ray * rax * i_a - rby * rbx * i_b
        mass[j, 2] = -ray * i_a - rby * i_b
        mass[j, 3] = m_a + m_b + rax * rax * i_a + rbx * rbx * i_b
        mass[j, 4] = rax * i_a + rbx * i_b
        mass[j, 5] = i_a + i_b
        angle = car.angle[b] - car.angle[0] - ZERO
        state = 0
        if angle <= -LIMIT:
            state = 1
        elif angle >= LIMIT:
            state = 2
        if state != car.limit_state[j] or state == 0:
            car.impulse[j, 2] = ZERO
        car.limit_state[j] = state
        px, py = car.impulse[j, 0], car.impulse[j, 1]
        car.velocity[0, 0] -= m_a * px
        car.velocity[0, 1] -= m_a * py
        car.spin[0] -= i_a * (_cross(rax, ray, px, py) + car.motor_impulse[j] + car.impulse[j, 2])
        car.velocity[b, 0] += m_b * px
        car.velocity[b, 1] += m_b * py
        car.spin[b] += i_b * (_cross(rbx, rby, px, py) + car.motor_impulse[j] + car.impulse[j, 2])


@njit(cache=True, nogil=True)
def _position_sweep(car, m, inertia, lx, ly):
    """One sweep of position correction (Box2D's nonlinear Gauss-Seidel); True when every joint is within its slop."""
    m_a, i_a, m_b, i_b = m[0], inertia[0], m[1], inertia[1]
    motor_mass = ONE / (i_a + i_b)
    okay = True
    for j in range(3, -1, -1):
        b = j + 1
        a_a, a_b = car.angle[0], car.angle[b]
        angular_error = ZERO
        if car.limit_state[j] != 0:
            angle = a_b - a_a - ZERO
            if car.limit_state[j] == 1:
                error = angle - (-LIMIT)
                angular_error = -error
                error = max(-MAX_ANGULAR_CORRECTION, min(error + ANGULAR_SLOP, ZERO))
            else:
                error = angle - LIMIT
                angular_error = error
                error = max(ZERO, min(error - ANGULAR_SLOP, MAX_ANGULAR_CORRECTION))
            push = -motor_mass * error
            a_a -= i_a * push
            a_b += i_b * push
        s, c = f4(math.sin(a_a)), f4(math.cos(a_a))
        ax, ay = f4(WHEEL_ANCHORS[j, 0]) - lx, f4(WHEEL_ANCHORS[j, 1]) - ly
        rax, ray = c * ax - s * ay, s * ax + c * ay
        ex = car.centre[b, 0] + ZERO - car.centre[0, 0] - rax
        ey = car.centre[b, 1] + ZERO - car.centre[0, 1] - ray
        length = f4(math.sqrt(ex * ex + ey * ey))
        k11 = m_a + m_b + i_a * ray * ray
        k12 = -i_a * rax * ray
        k22 = m_a + m_b + i_a * rax * rax
        det = k11 * k22 - k12 * k12
        if det != ZERO:
            det = ONE / det
        px = -(det * (k22 * ex - k12 * ey))
        py = -(det * (k11 * ey - k12 * ex))
        car.centre[0, 0] -= m_a * px
        car.centre[0, 1] -= m_a * py
        a_a -= i_a * _cross(rax, ray, px, py)
        car.centre[b, 0] += m_b * px
        car.centre[b, 1] += m_b * py
        car.angle[0], car.angle[b] = a_a, a_b
        if length > LINEAR_SLOP or angular_error > ANGULAR_SLOP:
            okay = False
    return okay


@njit(cache=True, nogil=True)
def _sleep(car, solved):
    least = f4(3.0e38)
    for i in range(5):
        vx, vy, w = car.velocity[i, 0], car.velocity[i, 1], car.spin[i]
        if w * w > ANGULAR_SLEEP * ANGULAR_SLEEP or vx * vx + vy * vy > LINEAR_SLEEP * LINEAR_SLEEP:
            car.sleep[i] = ZERO
            least = ZERO
        else:
            car.sleep[i] += STEP
            least = min(least, car.sleep[i])
    if least >= TIME_TO_SLEEP and solved:
        car.sleep[:] = ZERO
        car.velocity[:] = ZERO
        car.spin[:] = ZERO


@njit(cache=True, nogil=True)
def advance(car, bodies):
    """One step of 1/50 s: tyre forces, joints, motion. Contacts (`on_road`) are those found before."""
    motor_speed = np.empty(4, f4)
    force = np.empty((4, 2), f4)
    r = np.empty((4, 4), f4)
    mass = np.empty((4, 6), f4)
    m = (bodies[0], bodies[4])
    inertia = (bodies[1], bodies[5])
    lx, ly = bodies[2], bodies[3]
    _wheels(car, motor_speed, force)
    for i in range(4):
        car.velocity[i + 1, 0] += STEP * (ZERO + m[1] * force[i, 0])
        car.velocity[i + 1, 1] += STEP * (ZERO + m[1] * force[i, 1])
    _prepare_joints(car, r, mass, m, inertia, lx, ly)
    for _ in range(180):
        if not _velocity_sweep(car, motor_speed, r, mass, m, inertia):
            break
    for i in range(5):
        vx, vy, w = car.velocity[i, 0], car.velocity[i, 1], car.spin[i]
        tx, ty = STEP * vx, STEP * vy
        square = tx * tx + ty * ty
        if square > MAX_TRANSLATION * MAX_TRANSLATION:
            ratio = MAX_TRANSLATION / f4(math.sqrt(square))
            vx *= ratio
            vy *= ratio
        turn = STEP * w
        if turn * turn > MAX_ROTATION * MAX_ROTATION:
            w *= MAX_ROTATION / abs(turn)
        car.centre[i, 0] += STEP * vx
        car.centre[i, 1] += STEP * vy
        car.angle[i] += STEP * w
        car.velocity[i, 0], car.velocity[i, 1], car.spin[i] = vx, vy, w
    solved = False
    for _ in range(60):
        if _position_sweep(car, m, inertia, lx, ly):
            solved = True
            break
    for i in range(5):
        s, c = f4(math.sin(car.angle[i])), f4(math.cos(car.angle[i]))
        car.sine[i], car.cosine[i] = s, c
        ox, oy = (lx, ly) if i == 0 else (ZERO, ZERO)
        car.position[i, 0] = car.centre[i, 0] - (c * ox - s * oy)
        car.position[i, 1] = car.centre[i, 1] - (s * ox + c * oy)
    _sleep(car, solved)
